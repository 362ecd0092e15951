"""Raw rows of the formats that people have, read as examples: named by the user, or detected when that is certain.

    hh                   chosen, rejected: transcripts with "\\n\\nHuman:" and "\\n\\nAssistant:" before each turn
    preference           prompt, chosen, rejected: each text, or messages of role and content (TRL, OpenRLHF)
    preference_implicit  chosen, rejected: whole conversations, or texts that begin alike; the prompt is the common part
    sharegpt_preference  conversations of from and value, chosen, rejected: one message each (LLaMA-Factory)
    alpaca               instruction, output, and where present input, system and history (pairs of texts)
    messages             messages of role and content, the last one being the reply (OpenAI, TRL)
    prompt_completion    prompt, completion: each text or messages (TRL)
    sharegpt             conversations of from and value, the last one being the reply, and where present system

The first four hold pairs, the others single replies. Beside them are read, where they are present:

    system    a text: the system message, in every format
    margin    a number, beside a pair
    history   pairs of texts (user, assistant): earlier turns, before a prompt that is a text
    input     a text that follows a prompt or instruction that is a text

A prompt whose text is a transcript is read as its turns.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from stages.lib.command.errors import StageError
from stages.lib.data import hh_transcripts
from stages.lib.data.conversations import (
    Example,
    MalformedRowError,
    Message,
    UnusableRowError,
    checked,
    example_from,
    margin_from,
    message_from,
    messages_from,
    pair_from,
    reply_of,
    text_from,
)
from stages.lib.data.raw_rows import RawRow

Format = Literal[
    "hh",
    "preference",
    "preference_implicit",
    "sharegpt_preference",
    "alpaca",
    "messages",
    "prompt_completion",
    "sharegpt",
]
# Beside chosen and rejected these leave no doubt that the prompt is in them.
BESIDE_AN_IMPLICIT_PROMPT = {"chosen", "rejected", "margin", "system", "history"}
SHAREGPT_KEYS = ("from", "value")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def read_example(row: RawRow, name: Format, where: str) -> Example:
    """Read one raw row of format `name`.

    Args:
        where: file and row, for the message of an error.
    Raises:
        MalformedRowError: a column is missing or of the wrong type, a role is unknown.
        UnusableRowError: the row is well formed and of no use, such as one with an empty reply.
    """
    if missing := missing_columns(row, name):
        raise MalformedRowError(
            f"{where}: format '{name}' needs the column '{missing[0]}', found {', '.join(row) or 'none'}; "
            "name another format, or say in columns which of yours it is",
            "missing_column",
        )
    margin = margin_from(row.get("margin"), where)
    example = with_system(READERS[name].read(row, where), row, where)
    return replace(example, margin=margin) if example.rejected is not None else example


def missing_columns(row: RawRow, name: Format) -> list[str]:
    return [column for column in READERS[name].columns if column not in row]


def with_system(example: Example, row: RawRow, where: str) -> Example:
    """The example with the text of the column `system` as its first message, unless that is there already."""
    content = text_from(row.get("system"), f"{where}, 'system'")
    if not content.strip():
        return example
    first = example.prompt[0]
    if first["role"] != "system":
        return checked(replace(example, prompt=[{"role": "system", "content": content}, *example.prompt]))
    if first["content"].strip() != content.strip():
        raise MalformedRowError(
            f"{where}: the column 'system' says something else than the conversation's own system message; keep one",
            "two_system_messages",
        )
    return example


class FormatOfRows:
    """The one format of all rows: the one named, or the one that the first row is certain to be of.

    Rows of another file, or with other columns, must be certain to be of it, too: a folder of several formats is not
    read as the first of them.
    """

    def __init__(self, named: Literal["auto"] | Format) -> None:
        self.name: Format | None = None if named == "auto" else named
        self._detected = named == "auto"
        self._first = ""
        self._known: set[tuple[str, frozenset[str], bool]] = set()

    def of(self, row: RawRow, where: str) -> Format:
        """The format to read `row` in.

        Raises:
            StageError: it cannot be told, or it is not that of the first row.
        """
        if self.name is not None and (not self._detected or missing_columns(row, self.name)):
            return self.name
        kind = (where.rpartition(", ")[0], frozenset(row.keys() & COLUMNS), not row.keys() <= COLUMNS)
        if kind not in self._known:
            name = detect_format(row, where)
            self.name, self._first = self.name or name, self._first or where
            if name != self.name:
                raise StageError(
                    f"{where}: the row is of format '{name}', and {self._first} of '{self.name}'; "
                    "give data of one format, or name in format what all rows are to be read as"
                )
            self._known.add(kind)
        assert self.name is not None, "the first row gives it, if the settings do not"
        return self.name


def detect_format(row: RawRow, where: str) -> Format:
    """The only format that a row can be of, by its columns and the kinds of their values.

    Raises:
        StageError: none or several formats are possible (they are listed), or the row is of an unpaired preference.
    """
    if isinstance(row.get("label"), bool) and not {"chosen", "rejected"} <= row.keys():
        raise StageError(
            f"{where}: a reply with a true or false 'label' (KTO) is unpaired, and preferences need pairs: "
            "expected a chosen and a rejected reply to the same prompt"
        )
    candidates = pair_candidates(row) + reply_candidates(row)
    if len(candidates) == 1:
        return candidates[0]
    found = f"columns {', '.join(row) or 'none'}"
    if not candidates:
        known = ", ".join(f"{name} ({', '.join(reader.columns)})" for name, reader in READERS.items())
        raise StageError(f"{where}: {found} fit no format; say in columns which of yours is which. Known: {known}")
    raise StageError(f"{where}: {found} could be of the formats {' or '.join(candidates)}; name one in format")


def pair_candidates(row: RawRow) -> list[Format]:
    """The formats of preference pairs that a row can be of."""
    if not {"chosen", "rejected"} <= row.keys():
        return []
    replies = (row["chosen"], row["rejected"])
    if all(hh_transcripts.is_transcript(reply) for reply in replies):
        return ["hh", "preference"] if "prompt" in row else ["hh"]
    either: tuple[Format, ...] = ("preference", "sharegpt_preference")
    named = [name for name in either if not missing_columns(row, name)]
    if named:
        return named
    if all(isinstance(reply, list) for reply in replies) or row.keys() <= BESIDE_AN_IMPLICIT_PROMPT:
        return ["preference_implicit"]
    # Texts beside columns that we do not know: one of those may be the prompt.
    return ["preference_implicit", "preference"]


def reply_candidates(row: RawRow) -> list[Format]:
    """The formats of single replies that a row can be of."""
    names = [name for name in WITHOUT_PAIRS if not missing_columns(row, name)]
    beside_a_pair = {"chosen", "rejected"} <= row.keys()
    return [name for name in names if not (name == "sharegpt" and beside_a_pair)]


def read_hh(row: RawRow, where: str) -> Example:
    chosen, rejected = (text_from(row[key], f"{where}, '{key}'") for key in ("chosen", "rejected"))
    return pair_from(hh_transcripts.turns(chosen), hh_transcripts.turns(rejected))


def read_preference(row: RawRow, where: str) -> Example:
    prompt = as_prompt(row, where)
    return checked(Example(prompt, as_reply(row, "chosen", prompt, where), as_reply(row, "rejected", prompt, where)))


def read_preference_implicit(row: RawRow, where: str) -> Example:
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if hh_transcripts.is_transcript(chosen) and hh_transcripts.is_transcript(rejected):
            refuse_beside(row, ("history",), "transcripts", where)
            return read_hh(row, where)
        return split_texts(chosen, rejected, history_of(row, where))
    refuse_beside(row, ("history",), "messages", where)
    return pair_from(*(messages_from(row[key], f"{where}, '{key}'") for key in ("chosen", "rejected")))


def split_texts(chosen: str, rejected: str, history: list[Message]) -> Example:
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
    return checked(Example([*history, {"role": "user", "content": prompt}], chosen[shared:], rejected[shared:]))


def read_sharegpt_preference(row: RawRow, where: str) -> Example:
    prompt = sharegpt_messages(row, where)
    replies = [
        message_from(row[key], f"{where}, '{key}'", SHAREGPT_KEYS, SHAREGPT_ROLES) for key in ("chosen", "rejected")
    ]
    return pair_from([*prompt, replies[0]], [*prompt, replies[1]])


def read_sharegpt(row: RawRow, where: str) -> Example:
    return example_from(sharegpt_messages(row, where))


def sharegpt_messages(row: RawRow, where: str) -> list[Message]:
    return messages_from(row["conversations"], f"{where}, 'conversations'", SHAREGPT_KEYS, SHAREGPT_ROLES)


def read_alpaca(row: RawRow, where: str) -> Example:
    text = with_input(text_from(row["instruction"], f"{where}, 'instruction'"), row, where)
    prompt = [*history_of(row, where), {"role": "user", "content": text}]
    return checked(Example(prompt, text_from(row["output"], f"{where}, 'output'")))


def read_messages(row: RawRow, where: str) -> Example:
    return example_from(messages_from(row["messages"], f"{where}, 'messages'"))


def read_prompt_completion(row: RawRow, where: str) -> Example:
    prompt = as_prompt(row, where)
    return checked(Example(prompt, as_reply(row, "completion", prompt, where)))


def as_prompt(row: RawRow, where: str) -> list[Message]:
    """A prompt given as messages, as a transcript, or as the text of one user message after those of `history`."""
    value, place = row["prompt"], f"{where}, 'prompt'"
    if isinstance(value, list):
        refuse_beside(row, ("history", "input"), "a prompt of messages", where)
        return messages_from(value, place)
    content = text_from(value, place)
    if hh_transcripts.is_prompt_transcript(content):
        refuse_beside(row, ("history", "input"), "a prompt that is a transcript", where)
        return hh_transcripts.prompt_turns(content, place)
    content = with_input(content, row, where)
    return [*history_of(row, where), {"role": "user", "content": content}] if content.strip() else []


def with_input(text: str, row: RawRow, where: str) -> str:
    """An input follows its instruction after an empty line: a template with headings is for models without roles."""
    parts = (text, text_from(row.get("input"), f"{where}, 'input'"))
    return "\n\n".join(part for part in parts if part.strip())


def history_of(row: RawRow, where: str) -> list[Message]:
    """The earlier turns that the column `history` holds as pairs of texts."""
    history, place = row.get("history") or [], f"{where}, 'history'"
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise MalformedRowError(f"{place}: expected a list of pairs of texts (instruction, reply)", "bad_history")
    return [
        {"role": role, "content": text_from(text, place)}
        for turn in history
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def refuse_beside(row: RawRow, columns: tuple[str, ...], found: str, where: str) -> None:
    """Refuse a column that goes with a prompt of text alone and has a value beside another one."""
    for column in columns:
        if is_given(row.get(column)):
            raise StageError(unread_value(f"{where}: the column '{column}' beside {found}", column))


def is_given(value: Any) -> bool:
    """False for what tables write where there is no value: null, nothing but white space, an empty list."""
    return bool(value.strip()) if isinstance(value, str) else value is not None and value not in ([], {})


def unread_value(what: str, name: str) -> str:
    """The message about a value whose meaning is known, and that nothing reads."""
    return (
        f"{what} is read by nothing here, and the data would lose what it says; "
        f"to leave it out, put {name!r} into prepare_data.ignore_columns"
    )


def as_reply(row: RawRow, column: str, prompt: list[Message], where: str) -> str:
    """A reply given as text, or as messages or a transcript: the assistant's, perhaps after the whole prompt again."""
    value = row[column]
    if hh_transcripts.is_transcript(value):
        messages = hh_transcripts.turns(value)
    elif isinstance(value, list):
        messages = messages_from(value, f"{where}, '{column}'")
    else:
        text = text_from(value, f"{where}, '{column}'")
        asked = row["prompt"]
        return hh_transcripts.reply_turn(text) if is_transcript_text(asked) else text
    if len(messages) > 1 and messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    reply = reply_of(messages)
    if len(messages) > 1:
        raise UnusableRowError("prompt_mismatch")
    return reply


def is_transcript_text(value: Any) -> bool:
    return isinstance(value, str) and hh_transcripts.is_prompt_transcript(value)


class Reader(NamedTuple):
    """How a format is read: the columns that it needs, those that it reads where they are present, and the function."""

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[RawRow, str], Example]


READERS: dict[Format, Reader] = {
    "hh": Reader(("chosen", "rejected"), ("system", "margin"), read_hh),
    "preference": Reader(("prompt", "chosen", "rejected"), ("input", "system", "history", "margin"), read_preference),
    "preference_implicit": Reader(("chosen", "rejected"), ("system", "history", "margin"), read_preference_implicit),
    "sharegpt_preference": Reader(
        ("conversations", "chosen", "rejected"), ("system", "margin"), read_sharegpt_preference
    ),
    "alpaca": Reader(("instruction", "output"), ("input", "system", "history"), read_alpaca),
    "messages": Reader(("messages",), ("system",), read_messages),
    "prompt_completion": Reader(("prompt", "completion"), ("input", "system", "history"), read_prompt_completion),
    "sharegpt": Reader(("conversations",), ("system",), read_sharegpt),
}
COLUMNS = frozenset(column for reader in READERS.values() for column in (*reader.columns, *reader.optional))
WITHOUT_PAIRS: tuple[Format, ...] = tuple(name for name, reader in READERS.items() if "rejected" not in reader.columns)
