"""Formats of single replies, of prompts alone and of whole texts."""

from stages.lib.data.conversations import Example, Message, example_from, messages_from, text_from
from stages.lib.data.raw_rows import RawRow
from stages.lib.data.readers.prompt_and_reply import in_template, prompt_in, reply_in
from stages.lib.data.readers.row_place import RowPlace
from stages.lib.data.row_errors import UnusableRowError


def read_alpaca(row: RawRow, place: RowPlace) -> list[Example]:
    return [with_reply(row, "instruction", "output", place)]


def read_prompt_completion(row: RawRow, place: RowPlace) -> list[Example]:
    return [with_reply(row, "prompt", "completion", place)]


def read_question_answer(row: RawRow, place: RowPlace) -> list[Example]:
    return [with_reply(row, "question", "answer", place)]


def with_reply(row: RawRow, prompt_column: str, reply_column: str, place: RowPlace) -> Example:
    prompt = prompt_in(row, prompt_column, place)
    return Example(prompt, reply_in(row[reply_column], place.column(reply_column), prompt, row[prompt_column]))


def read_messages(row: RawRow, place: RowPlace) -> list[Example]:
    return [example_from(messages_from(row["messages"], place.column("messages")))]


def read_sharegpt(row: RawRow, place: RowPlace) -> list[Example]:
    """A conversation that may end with the user's message: it has no reply, and is cut and counted."""
    messages = sharegpt_messages(row, place)
    if messages and messages[-1]["role"] == "user":
        place.counts["cut/last_user_turn"] += 1
        messages = messages[:-1]
    return [example_from(messages)]


def sharegpt_messages(row: RawRow, place: RowPlace) -> list[Message]:
    """The messages without a first one of the assistant, which answers nothing: it is cut and counted."""
    messages = messages_from(row["conversations"], place.column("conversations"))
    first = 1 if messages and messages[0]["role"] == "system" else 0
    if len(messages) <= first or messages[first]["role"] != "assistant":
        return messages
    if len(messages) == first + 1:
        raise UnusableRowError("empty_prompt")
    place.counts["cut/first_assistant_turn"] += 1
    return [*messages[:first], *messages[first + 1 :]]


def read_prompt(row: RawRow, place: RowPlace) -> list[Example]:
    return [Example(prompt_in(row, "prompt", place))]


def read_text(row: RawRow, place: RowPlace) -> list[Example]:
    text = text_from(row["text"], place.column("text"))
    templated = in_template(text, place)
    return [Example(text=templated if text.strip() else text)]
