"""The curves of training runs as tables: CSV with a column `step`, one row a step, empty where nothing was measured."""

import csv
import io
import math
import os
from pathlib import Path
from reprlib import repr as quoted
from typing import NamedTuple

from stages.lib.command.errors import StageError
from stages.lib.report.number_formats import LARGEST, is_usable

VALIDATION = "validation/"
STEP = "step"
MOST_COLUMNS = 500  # each is a figure of the page
AGAIN = "run its training stage again"


class CurveTable(NamedTuple):
    """`steps` (n,), whole and rising; `metrics`: each column but `step` (n,), None where nothing was measured."""

    steps: list[int]
    metrics: dict[str, list[float | None]]

    def points(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which a metric was measured, and its values there; none if the table lacks the column."""
        values = self.metrics.get(name, [None] * len(self.steps))
        points = [(step, value) for step, value in zip(self.steps, values, strict=True) if value is not None]
        return [step for step, _ in points], [value for _, value in points]


def curve_in(path: Path) -> CurveTable:
    """The curve in a file. Raises StageError as `read_curve`, and if there is no such file."""
    if not path.is_file():
        raise StageError(f"{path} {'is not a file' if os.path.lexists(path) else 'does not exist'}; {AGAIN}")
    return read_curve(path.read_bytes(), str(path))


def read_curve(content: bytes, where: str) -> CurveTable:
    """The curve in a CSV file of this content. A cell is a number or empty.

    Raises:
        StageError: not a table, no column `step`, no row, a cell that is not a usable number, a step that does not rise
            (`where`, and the column or the line, are named).
    """
    try:
        lines = csv.reader(io.StringIO(content.decode("utf-8"), newline=""), strict=True)
        names = next(lines, [])
        check_names(names, where)
        rows = [(f"{where}, line {lines.line_num}", cells) for cells in lines if cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise StageError(f"{where} is not a CSV table in UTF-8: {error}; {AGAIN}") from None
    if not rows:
        raise StageError(f"{where} holds no step, only the names of its columns; {AGAIN}")
    columns: dict[str, list[float | None]] = {name: [] for name in names}
    for place, cells in rows:
        if len(cells) != len(names):
            raise StageError(f"{place}: expected {len(names)} cells, found {len(cells)}; {AGAIN}")
        for name, cell in zip(names, cells, strict=True):
            columns[name].append(number_in(cell, f"{place}: column '{name}'"))
    steps = rising(columns.pop(STEP), [place for place, _ in rows])
    return CurveTable(steps, columns)


def check_names(names: list[str], where: str) -> None:
    if not names:
        raise StageError(f"{where} is empty, expected a CSV table with a column '{STEP}'; {AGAIN}")
    if len(names) > MOST_COLUMNS:
        raise StageError(f"{where} has {len(names)} columns, expected at most {MOST_COLUMNS}; {AGAIN}")
    if STEP not in names:
        raise StageError(f"{where}: column '{STEP}' is missing, found: {', '.join(names)}")
    twice = next((name for name in names if names.count(name) > 1 or not name), None)
    if twice is not None:
        found = f"column '{twice}' comes twice" if twice else "a column has no name"
        raise StageError(f"{where}: {found}; {AGAIN}")


def number_in(cell: str, where: str) -> float | None:
    """The number that a cell holds; None if it is empty, or NaN: what a run could not measure."""
    if not cell:
        return None
    try:
        value = float(cell)
    except ValueError:
        value = None
    if value is None or "_" in cell or (math.isfinite(value) and not is_usable(value)):  # Python reads 1_0 as 10
        raise StageError(f"{where} holds {quoted(cell)}, expected a number of at most {LARGEST:g}, or nothing; {AGAIN}")
    return None if math.isnan(value) else value


def rising(steps: list[float | None], places: list[str]) -> list[int]:
    """The column `step` as integers."""
    whole: list[int] = []
    before = -1
    for step, place in zip(steps, places, strict=True):
        if step is None or not before < step < 2**53 or step != int(step):
            found = "nothing" if step is None else f"{step:g}"
            raise StageError(f"{place}: column '{STEP}' holds {found}, expected a whole number above {before}; {AGAIN}")
        before = int(step)
        whole.append(before)
    return whole


def training_and_evaluation(columns: list[str]) -> dict[str, list[str]]:
    """The columns to show together: each metric with its `validation/` twin, or alone, in the order of the table."""
    together: dict[str, list[str]] = {}
    for name in columns:
        together.setdefault(name.removeprefix(VALIDATION), []).append(name)
    return together
