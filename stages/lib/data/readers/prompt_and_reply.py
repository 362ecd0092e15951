"""The prompt of a row, and a reply to it: as texts, as messages or as transcripts."""

from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.data import hh_transcripts
from stages.lib.data.conversations import Message, message_from, messages_from, reply_of, text_from, user
from stages.lib.data.raw_rows import RawRow
from stages.lib.data.readers.row_place import RowPlace, is_given, refuse_beside
from stages.lib.data.row_errors import MalformedRowError, UnusableRowError

# Each column that can hold a prompt, and those that go with it where it is a text.
TEXTS_OF_A_PROMPT = {
    "prompt": ("input", "history"),
    "instruction": ("input", "history"),
    "question": ("context", "history"),
}
COLUMNS_OF_PROMPTS = (*TEXTS_OF_A_PROMPT, "messages", "conversations")
BESIDE_A_TEXT = ("input", "context", "history")


def any_prompt(row: RawRow, place: RowPlace) -> list[Message] | None:
    """The prompt of the one column that holds it; None if a row has no such column.

    Raises:
        StageError: several columns could hold it.
        MalformedRowError: its value is neither text nor messages.
    """
    columns = [column for column in COLUMNS_OF_PROMPTS if is_given(row.get(column))]
    if len(columns) > 1:
        raise StageError(
            f"{place.where}: the columns {' and '.join(columns)} could each hold the prompt; put the others into "
            "ignore_columns"
        )
    return prompt_in(row, columns[0], place) if columns else None


def prompt_in(row: RawRow, column: str, place: RowPlace) -> list[Message]:
    """A prompt given as messages, as a transcript, or as the text of one user message after those of `history`."""
    value = row[column]
    if isinstance(value, list) or column not in TEXTS_OF_A_PROMPT:
        refuse_beside(row, BESIDE_A_TEXT, "a prompt of messages", place)
        return messages_from(value, place.column(column))
    text = text_from(value, place.column(column))
    if hh_transcripts.is_prompt_transcript(text):
        refuse_beside(row, BESIDE_A_TEXT, "a prompt that is a transcript", place)
        return hh_transcripts.prompt_turns(text, place.column(column))
    text = with_second_text(text, row, column, place)
    asked = in_template(text, place)
    return [*history_of(row, place), user(asked)] if text.strip() else []


def with_second_text(text: str, row: RawRow, column: str, place: RowPlace) -> str:
    """An input follows its instruction, and a context comes before its question, with an empty line between them.

    A template with headings, as Alpaca's, is for models without roles.
    """
    parts = [text]
    if "input" in TEXTS_OF_A_PROMPT[column]:
        parts = [text, text_from(row.get("input"), place.column("input"))]
    if "context" in TEXTS_OF_A_PROMPT[column]:
        parts = [text_from(row.get("context"), place.column("context")), text]
    return "\n\n".join(part for part in parts if part.strip())


def in_template(text: str, place: RowPlace) -> str:
    """The text in the template of the options, where there is one."""
    place.templated = True
    template = place.options.input_template
    return text if template is None else template.format(text)


def history_of(row: RawRow, place: RowPlace) -> list[Message]:
    """The earlier turns that the column `history` holds as pairs of texts."""
    history, where = row.get("history") or [], place.column("history")
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise MalformedRowError(f"{where}: expected a list of pairs of texts (instruction, reply)", "bad_history")
    return [
        {"role": role, "content": text_from(text, where)}
        for turn in history
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def reply_in(value: Any, where: str, prompt: list[Message], asked: Any) -> Message:
    """A reply given as text, as a message, or as messages or a transcript: perhaps after the whole prompt again.

    Args:
        asked: what the row holds as the prompt: a reply goes on a transcript with a text of its own.
    Raises:
        UnusableRowError: it ends with no message of the assistant, or answers another prompt.
    """
    if isinstance(value, dict):
        messages = [message_from(value, where)]
    elif isinstance(value, list):
        messages = messages_from(value, where)
    elif hh_transcripts.is_transcript(value):
        messages = hh_transcripts.turns(value)
    else:
        text = text_from(value, where)
        goes_on = isinstance(asked, str) and hh_transcripts.is_prompt_transcript(asked)
        return {"role": "assistant", "content": hh_transcripts.reply_turn(text) if goes_on else text}
    if len(messages) > 1 and messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    reply = reply_of(messages)
    if len(messages) > 1:
        raise UnusableRowError("prompt_mismatch")
    return reply
