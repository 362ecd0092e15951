"""The curves of training runs as tables: CSV with a column `step`, one row a step, empty where nothing was measured."""

import io
from typing import TYPE_CHECKING

from stages.lib.errors import StageError

if TYPE_CHECKING:
    import pandas

EVAL = "eval/"


def read_curve(text: str, where: str) -> "pandas.DataFrame":
    """The curve in the CSV `text`: one float column a metric, indexed by step; an empty cell is NaN.

    Raises:
        StageError: no table, no column `step`, a cell that is no number, a step that is missing or comes twice
            (`where` and the column are named).
    """
    import pandas

    try:
        table = pandas.read_csv(io.StringIO(text))
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError) as error:
        raise StageError(f"{where} is no CSV table: {str(error).strip()}; run its training stage again") from None
    if "step" not in table.columns:
        raise StageError(f"{where}: column 'step' is missing, found: {', '.join(map(str, table.columns))}")
    for name in table.columns:
        if not pandas.api.types.is_numeric_dtype(table[name]) or pandas.api.types.is_bool_dtype(table[name]):
            cell = next(cell for cell in table[name].dropna() if not is_number(cell))
            raise StageError(f"{where}: column '{name}' holds {cell!r}, expected a number or nothing")
    if table["step"].isna().any() or table["step"].duplicated().any():
        raise StageError(f"{where}: column 'step' must hold each step once, and be empty nowhere")
    return table.set_index("step").astype("float64")


def is_number(cell: object) -> bool:
    if isinstance(cell, bool):
        return False
    try:
        float(str(cell))
    except ValueError:
        return False
    return True


def training_and_evaluation(columns: list[str]) -> dict[str, list[str]]:
    """The columns to show together: each metric with its `eval/` twin, or that alone, in the order of the table."""
    together: dict[str, list[str]] = {}
    for name in columns:
        together.setdefault(name.removeprefix(EVAL), []).append(name)
    return together
