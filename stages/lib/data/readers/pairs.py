"""Formats of preference pairs, in which a chosen and a rejected reply stand under these names."""

from stages.lib.command.errors import StageError
from stages.lib.data import hh_transcripts
from stages.lib.data.conversations import Example, Message, assistant, messages_from, pair_from, text_from, user
from stages.lib.data.raw_rows import RawRow
from stages.lib.data.readers.prompt_and_reply import COLUMNS_OF_PROMPTS, history_of, in_template, prompt_in, reply_in
from stages.lib.data.readers.row_place import RowPlace, is_given, refuse_beside
from stages.lib.data.readers.single_replies import sharegpt_messages
from stages.lib.data.row_errors import MalformedRowError, UnusableRowError
from stages.lib.data.tool_calls import tools_from


def read_hh(row: RawRow, place: RowPlace) -> list[Example]:
    chosen, rejected = (text_from(row[key], place.column(key)) for key in ("chosen", "rejected"))
    return [pair_from(hh_transcripts.turns(chosen), hh_transcripts.turns(rejected))]


def read_preference(row: RawRow, place: RowPlace) -> list[Example]:
    return [pair_after(prompt_in(row, "prompt", place), row, "prompt", place)]


def read_alpaca_preference(row: RawRow, place: RowPlace) -> list[Example]:
    return [pair_after(prompt_in(row, "instruction", place), row, "instruction", place)]


def read_question_preference(row: RawRow, place: RowPlace) -> list[Example]:
    return [pair_after(prompt_in(row, "question", place), row, "question", place)]


def read_messages_preference(row: RawRow, place: RowPlace) -> list[Example]:
    return [pair_after(prompt_in(row, "messages", place), row, "messages", place)]


def read_sharegpt_preference(row: RawRow, place: RowPlace) -> list[Example]:
    return [pair_after(sharegpt_messages(row, place), row, "conversations", place)]


def pair_after(prompt: list[Message], row: RawRow, column: str, place: RowPlace) -> Example:
    chosen, rejected = (reply_in(row[key], place.column(key), prompt, row[column]) for key in ("chosen", "rejected"))
    return Example(prompt, chosen, rejected)


def read_preference_implicit(row: RawRow, place: RowPlace) -> list[Example]:
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if hh_transcripts.is_transcript(chosen) and hh_transcripts.is_transcript(rejected):
            refuse_beside(row, ("history",), "transcripts", place)
            return read_hh(row, place)
        refuse_beside(row, COLUMNS_OF_PROMPTS, "texts that begin with their prompt", place)
        return [split_texts(chosen, rejected, row, place)]
    refuse_beside(row, ("history",), "messages", place)
    return [pair_from(*(messages_from(row[key], place.column(key)) for key in ("chosen", "rejected")))]


def split_texts(chosen: str, rejected: str, row: RawRow, place: RowPlace) -> Example:
    """A pair of texts that begin alike. The prompt ends with the last whole word that they share."""
    if chosen == rejected:
        raise UnusableRowError("equal_replies")
    shared = 0
    for left, right in zip(chosen, rejected, strict=False):
        if left != right:
            break
        shared += 1
    while shared and not chosen[shared - 1].isspace():
        shared -= 1
    prompt = chosen[:shared].rstrip()
    if not prompt:
        raise UnusableRowError("empty_prompt")
    messages = [*history_of(row, place), user(in_template(prompt, place))]
    return Example(messages, assistant(chosen[shared:]), assistant(rejected[shared:]))


def read_openai_preference(row: RawRow, place: RowPlace) -> list[Example]:
    """`input` holds the conversation, and its tools; each output is a list of one message."""
    given = row["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise MalformedRowError(f"{place.column('input')}: expected an object with 'messages'", "not_messages")
    for key in given.keys() - {"messages", "tools", "parallel_tool_calls"}:  # the last is about calling their service
        if is_given(given[key]):
            raise MalformedRowError(f"{place.column('input')}: '{key}' is read by nothing here", "unread_key")
    prompt = messages_from(given["messages"], place.column("input"))
    tools = tools_from(given.get("tools"), f"{place.column('input')}, 'tools'")
    if tools is not None and row.get("tools"):
        raise StageError(f"{place.where}: tools stand in 'input' and in a column 'tools'; keep one")
    outputs = ("preferred_output", "non_preferred_output")
    chosen, rejected = (reply_in(row[key], place.column(key), prompt, None) for key in outputs)
    return [Example(prompt, chosen, rejected, tools=tools)]
