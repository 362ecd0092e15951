"""Messages that stand in a cell as text, which is how tables without types (CSV) hold them.

JSON is read, and so is what Python prints of a list of dictionaries; what is neither is an error, so that no reply is
ever the text of a list of messages.
"""

import json
import re
from collections.abc import Collection
from typing import Any

from stages.lib.data.cell_values import value_in_cell
from stages.lib.data.conversations import NAMES_OF_KEYS
from stages.lib.data.raw_rows import RawRow
from stages.lib.data.row_errors import MalformedRowError

LISTS = ("messages", "conversations", "history")  # columns that never hold a text
OPENAI_COLUMNS = ("input", "preferred_output", "non_preferred_output")  # nor do these, beside each other
REPLIES = ("chosen", "rejected", "completion")
PROMPTS = ("prompt", "instruction", "question")
TEXTS = (*PROMPTS, "output", "answer", *REPLIES)
LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{")


def with_messages_read(row: RawRow, where: str) -> RawRow:
    """The row with messages in place of the texts that hold them, as JSON or as Python prints them.

    A text counts as messages where nothing else is possible: in `messages`, `conversations` and `history`, and in the
    columns of OpenAI's preference files; as a single message beside a conversation if it is an object with the keys of
    one; in a prompt if it is a list of messages; and in a reply if it is such a list as are all replies beside it,
    where a prompt that is any list in JSON is meant as messages, too.

    Raises:
        MalformedRowError: a text is meant as messages and cannot be read, or stands beside replies of plain text.
    """
    places = {column: f"{where}, '{column}'" for column in row}
    lists = (*LISTS, *(OPENAI_COLUMNS if {*OPENAI_COLUMNS} <= row.keys() else ()))
    read = {column: parsed(row[column], places[column]) for column in lists if isinstance(row.get(column), str)}
    if "conversations" in row or "messages" in row:
        single = [column for column in REPLIES if is_text_of_message(row.get(column))]
        read |= {column: parsed(row[column], places[column]) for column in single}
    row = row | read if read else row
    texts = {column: row[column] for column in TEXTS if is_text_of_messages(row.get(column))}
    if not texts:
        return row
    replies = [column for column in REPLIES if column in row]
    if {*texts} <= {*PROMPTS}:
        return row | {column: parsed(text, places[column]) for column, text in texts.items()}
    certain = replies and all(column in texts or isinstance(row[column], list) for column in replies)
    if not certain or (replies == ["completion"] and "prompt" not in texts and not isinstance(row.get("prompt"), list)):
        reply = next(column for column in texts if column not in PROMPTS)
        raise MalformedRowError(
            f"{where}, '{reply}': messages written as text beside a prompt or reply of plain text; give "
            "either all replies as messages, or all as texts",
            "messages_as_text",
        )
    if is_text_of_list(row.get("prompt")):  # beside replies that are messages it is no sentence, be it as it may
        texts["prompt"] = row["prompt"]
    return row | {column: parsed(text, places[column]) for column, text in texts.items()}


def without_keys(row: RawRow, keys: Collection[str]) -> RawRow:
    """The row without those keys of its messages; the role and the content of a message stay whatever they are named.

    A key that is read, such as `weight`, is left out by name in this way.
    """
    keys = frozenset(keys) - {name for names in NAMES_OF_KEYS for name in names}
    if not keys:
        return row
    return {column: stripped(value, keys) for column, value in row.items()}


def stripped(value: Any, keys: frozenset[str]) -> Any:
    """A message, a list of them, or an object that holds such a list, without `keys`; anything else as it is."""
    if isinstance(value, list):
        return [stripped(item, keys) if isinstance(item, dict) else item for item in value]
    if isinstance(value, dict) and any({*names} & value.keys() for names in NAMES_OF_KEYS):
        return {key: item for key, item in value.items() if key not in keys}
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        return value | {"messages": stripped(value["messages"], keys)}
    return value


def is_text_of_messages(value: Any) -> bool:
    """True for the text of a list of messages, be it JSON or what Python prints."""
    if not isinstance(value, str) or not LIST_OF_OBJECTS.match(value):
        return False
    try:
        items = json.loads(value)
    except (ValueError, RecursionError):
        return any(all(re.search(rf"""(['"]){key}\1\s*:""", value) for key in keys) for keys in NAMES_OF_KEYS)
    if all(isinstance(item, dict) and "role" in item for item in items):
        return True  # also with another key misspelt, which is then told
    return any(all(isinstance(item, dict) and item.keys() >= {*keys} for item in items) for keys in NAMES_OF_KEYS)


def is_text_of_message(value: Any) -> bool:
    """True for the text of one message, be it JSON or what Python prints: a reply may well be another object."""
    return isinstance(value, str) and value.lstrip()[:1] == "{" and is_text_of_messages(f"[{value}]")


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
