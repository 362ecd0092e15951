"""Rows as JSON lines: UTF-8, one object a line, errors by file and line, files that appear whole or not at all."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from stages.lib.command.errors import StageError


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON-lines file.

    Raises:
        StageError: the file is missing or empty, or a line is not a JSON object (file and line are named).
    """
    if not path.is_file():
        raise StageError(f"{path} does not exist")
    empty = True
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            empty = False
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise StageError(f"{path}, line {number}: not UTF-8 text ({error.reason})") from None
            yield parse_object(text, f"{path}, line {number}")
    if empty:
        raise StageError(f"{path} is empty: expected one JSON object a line")


class _UnusableJsonError(ValueError):
    """What Python's parser would pass over, though the text does not say one thing."""


def parse_json(text: str, where: str, *, names_line: bool = True) -> Any:
    """Parse one JSON value, or raise a StageError that names `where`.

    Refused, too: a key that stands twice in an object, and NaN and Infinity, which are not JSON.

    Args:
        names_line: `where` already says which line the text is.
    """
    try:
        return json.loads(text, object_pairs_hook=_object_of, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        line = "" if names_line else f", line {error.lineno}"
        raise StageError(f"{where}{line}: not valid JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise StageError(f"{where}: not usable JSON (brackets nested too deeply)") from None
    except _UnusableJsonError as error:
        raise StageError(f"{where}: not usable JSON ({error})") from None
    except ValueError:  # the only other one
        raise StageError(f"{where}: not usable JSON (an integer of more digits than Python reads)") from None


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _UnusableJsonError(f"the key {twice!r} stands twice in one object; which value counts?")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise _UnusableJsonError(f"{name} is not a JSON number; write null where there is no value")


def read_json(path: Path) -> Any:
    """The value that a JSON file holds.

    Raises:
        StageError: the file is not UTF-8 text or not JSON.
        OSError: it cannot be opened.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StageError(f"{path}: not UTF-8 text ({error.reason})") from None
    return parse_json(text, str(path), names_line=False)


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Parse one JSON object, or raise a StageError that names `where`."""
    row = parse_json(text, where)
    if not isinstance(row, dict):
        raise StageError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows to `path` through a temporary name; returns their number."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    partial.replace(path)
    return count


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a small mapping as indented JSON with a final newline, through a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
