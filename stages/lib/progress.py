"""The curve of a training run (CSV), and its progress on the console."""

import csv
import io
import sys
import time
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


class Progress:
    """Where a run stands: refreshed in place on a terminal, a plain line every `log_seconds` in a log.

    Args:
        unit: what `done` counts beside steps, for instance "tokens".
    """

    def __init__(self, name: str, total: int, log_seconds: float, *, first: int = 0, unit: str = "tokens") -> None:
        self.name = name
        self.total = total
        self.log_seconds = log_seconds
        self.unit = unit
        self.first = first
        self.units = 0
        self.started = time.monotonic()
        self.last_line = self.started
        self.on_terminal = sys.stdout.isatty()

    def update(self, done: int, units: int, metrics: Mapping[str, float]) -> None:
        """Report that `done` of `total` steps are over; `units` were handled in the last one."""
        self.units += units
        now = time.monotonic()
        last = done >= self.total
        if not self.on_terminal and not last and done > self.first + 1 and now - self.last_line < self.log_seconds:
            return
        self.last_line = now
        elapsed = max(now - self.started, 1e-9)
        left = elapsed / max(done - self.first, 1) * (self.total - done)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        text = (
            f"{self.name}  {done}/{self.total}  {shown}  "
            f"{self.units / elapsed:,.0f} {self.unit}/s  {int(left // 60)}:{int(left % 60):02d} left"
        )
        if self.on_terminal:
            print(f"\r\033[K{text}", end="\n" if last else "", flush=True)
        else:
            print(text, flush=True)
