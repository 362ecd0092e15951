"""Messages that stand in a cell as text, which is how tables without types (CSV) hold them.

JSON is read, and so is what Python prints of a list of dictionaries; what is neither is an error, so that no reply is
ever the text of a list of messages.
"""

import json
import re
from typing import Any

from stages.lib.data.cell_values import value_in_cell
from stages.lib.data.raw_rows import RawRow
from stages.lib.data.row_errors import MalformedRowError

LISTS = ("messages", "conversations", "history")  # columns that never hold a text
REPLIES = ("chosen", "rejected", "completion")
TEXTS = ("prompt", "instruction", "output", *REPLIES)
LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{")
KEYS = (("role", "content"), ("from", "value"))


def with_messages_read(row: RawRow, where: str) -> RawRow:
    """The row with messages in place of the texts that hold them as JSON.

    A text counts as messages where nothing else is possible: in `messages`, `conversations` and `history`; beside a
    ShareGPT conversation; and elsewhere if it is a list of messages as are all replies beside it, where a prompt that
    is any list in JSON is meant as messages, too.

    Raises:
        MalformedRowError: a text is meant as messages and is not JSON, or stands beside replies of plain text.
    """
    places = {column: f"{where}, '{column}'" for column in row}
    read = {column: parsed(row[column], places[column]) for column in LISTS if isinstance(row.get(column), str)}
    if "conversations" in row:
        single = [column for column in REPLIES if isinstance(row.get(column), str) and row[column].lstrip()[:1] == "{"]
        return row | read | {column: parsed(row[column], places[column]) for column in single}
    texts = {column: row[column] for column in TEXTS if is_text_of_messages(row.get(column))}
    if not texts:
        return row | read if read else row
    replies = [column for column in REPLIES if column in row]
    certain = replies and all(column in texts or isinstance(row[column], list) for column in replies)
    if not certain or (replies == ["completion"] and "prompt" not in texts and not isinstance(row.get("prompt"), list)):
        raise MalformedRowError(
            f"{where}, '{next(iter(texts))}': messages written as text beside columns that are plain text; "
            "give either all replies as messages, or all as texts",
            "messages_as_text",
        )
    if is_text_of_list(row.get("prompt")):  # beside replies that are messages it is no sentence, be it as it may
        texts["prompt"] = row["prompt"]
    return row | read | {column: parsed(text, places[column]) for column, text in texts.items()}


def is_text_of_messages(value: Any) -> bool:
    """True for the text of a list of messages, be it JSON or what Python prints."""
    if not isinstance(value, str) or not LIST_OF_OBJECTS.match(value):
        return False
    try:
        items = json.loads(value)
    except (ValueError, RecursionError):
        return any(all(re.search(rf"""(['"]){key}\1\s*:""", value) for key in keys) for keys in KEYS)
    if all(isinstance(item, dict) and "role" in item for item in items):
        return True  # also with another key misspelt, which is then told
    return any(all(isinstance(item, dict) and item.keys() >= {*keys} for item in items) for keys in KEYS)


def is_text_of_list(value: Any) -> bool:
    """True for the text of any list in JSON."""
    if not isinstance(value, str) or value.lstrip()[:1] != "[":
        return False
    try:
        return isinstance(json.loads(value), list)
    except (ValueError, RecursionError):
        return False


def parsed(text: str, where: str) -> Any:
    """The value of a text that is meant as messages; nothing is an empty list of them."""
    if not text.strip():
        return []
    try:
        return value_in_cell(text, where)
    except MalformedRowError as error:
        raise MalformedRowError(f"{error}, for messages stand here", "messages_as_text") from None
