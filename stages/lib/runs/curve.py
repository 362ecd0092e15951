"""The curve of a training run, as CSV."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Curve:
    """A CSV with one row per optimizer step. Columns without a value at a step stay empty.

    Args:
        path: opened for appending; the header is written if the file is new or empty.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path = path
        self.columns = ("step", *columns)
        if not path.exists() or path.stat().st_size == 0:
            path.write_text(_csv_line(self.columns))

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the row of `step` (1-based). Raises KeyError for a metric that is no column."""
        unknown = set(metrics) - set(self.columns)
        if unknown:
            raise KeyError(f"no such columns: {sorted(unknown)}")
        cells = [str(step), *(f"{metrics[name]:.7g}" if name in metrics else "" for name in self.columns[1:])]
        with self.path.open("a") as file:
            file.write(_csv_line(cells))


def _csv_line(cells: Any) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
