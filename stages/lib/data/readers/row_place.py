"""Where a row that is read comes from, how it is to be read, and what is counted while it is."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.settings.reading import ReadingOptions


@dataclass(slots=True)
class RowPlace:
    """What a reader is told beside the row."""

    where: str  # file and row, as an error message names them
    options: ReadingOptions
    counts: Counter  # of what is cut from a row, and of pairs that are not made
    templated: bool = False  # the prompt was a text, and went into the template

    def column(self, name: str) -> str:
        return f"{self.where}, '{name}'"


def is_given(value: Any) -> bool:
    """False for what tables write where there is no value: null, nothing but white space, an empty list."""
    return bool(value.strip()) if isinstance(value, str) else value is not None and value not in ([], {})


def unread_value(what: str, name: str, instead: str = "") -> str:
    """The message about a value whose meaning is known, and that nothing reads; `instead` is how it could be."""
    return (
        f"{what} is read by nothing here, and the data would lose what it says; {instead}"
        f"to leave it out, put {name!r} into ignore_columns"
    )


def refuse_beside(row: dict[str, Any], columns: tuple[str, ...], found: str, place: RowPlace) -> None:
    """Refuse a column that goes with a prompt of text alone and has a value beside another one."""
    for column in columns:
        if is_given(row.get(column)):
            raise StageError(unread_value(f"{place.where}: the column '{column}' beside {found}", column))
