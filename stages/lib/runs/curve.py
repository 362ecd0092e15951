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

    def rows(self) -> list[tuple[int, dict[str, float]]]:
        """The rows so far: step, and the metrics that have a value there, with the digits of the file."""
        with self.path.open() as file:
            rows = list(csv.DictReader(file))
        return [(int(row["step"]), {name: float(row[name]) for name in self.columns[1:] if row[name]}) for row in rows]


def _csv_line(cells: Any) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
