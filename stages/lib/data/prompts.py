"""A prompt that a policy answers, with what its source knows of it: a row of the prompts' token table.

Messages, facts and context stand there as JSON text with sorted keys, so that equal values have equal bytes.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from stages.lib.command.errors import StageError
from stages.lib.command.jsonl import parse_json
from stages.lib.data.conversations import Message, messages_from


class Prompt(NamedTuple):
    """One row of the prompts' token table."""

    row: int  # line of the prepared file, 0-based; part of the identity of a response's random numbers
    ids: list[int]
    messages: list[Message]
    facts: dict[str, Any]  # what grades and rewards may look at: the task's name, an answer, …
    # What the ids were made of beside the messages, for whoever renders the prompt again: "tools" and
    # "template_arguments" of the chat template, or the "text" of a prompt without messages. Of a prompt that is "cut",
    # "text" is what of it the ids hold, and stands in place of its messages.
    context: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    source: str = ""

    @property
    def shown(self) -> list[Message] | str:
        """The prompt as those see it who do not read its ids: messages, or text."""
        return self.context.get("text", self.messages)


def prompts_of(columns: Mapping[str, list]) -> list[Prompt]:
    """The prompts of rows of a token table, as `table[rows]` gives them."""
    names = ("row", "prompt_ids", "messages", "facts", "context", "source")
    return [
        Prompt(
            row,
            ids,
            messages_in_cell(messages, f"row {row}, messages"),
            facts_in(facts, f"row {row}, facts"),
            facts_in(context, f"row {row}, context"),
            source,
        )
        for row, ids, messages, facts, context, source in zip(*(columns[name] for name in names), strict=True)
    ]


def json_text(value: Any) -> str:
    """JSON with sorted keys, in UTF-8.

    Raises:
        ValueError: a number is not finite, or a text holds half a surrogate pair.
        RecursionError: lists or objects are nested too deeply.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    text.encode()
    return text


def messages_in_cell(text: str, where: str) -> list[Message]:
    """The messages of a table's cell. Raises a StageError, beginning with `where`, if it holds none."""
    messages = messages_from(parse_json(text, where), where)  # none of a prompt of plain text
    _require_json(messages, where)
    return messages


def facts_in(text: str, where: str) -> dict[str, Any]:
    """The facts of a table's cell. Raises a StageError, beginning with `where`, if it holds none."""
    return facts_from(parse_json(text, where), where)


def facts_from(value: Any, where: str) -> dict[str, Any]:
    """Check the facts of a prompt. Raises a StageError unless they are an object that JSON text can hold."""
    if not isinstance(value, dict):
        raise StageError(f"{where}: expected an object, found {type(value).__name__}")
    _require_json(value, where)
    return value


def _require_json(value: Any, where: str) -> None:
    """Refuse what Python reads from JSON text and cannot write as such: 1e999, half a surrogate pair."""
    try:
        json_text(value)
    except UnicodeEncodeError:
        raise StageError(f"{where}: a text holds half a surrogate pair, which is no Unicode") from None
    except ValueError:
        raise StageError(f"{where}: a number is larger than any float64") from None
    except RecursionError:
        raise StageError(f"{where}: brackets are nested too deeply") from None
