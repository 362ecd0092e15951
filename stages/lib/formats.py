"""Raw rows of the formats that people have, read as examples: named by the user, or detected when that is certain.

    hh                   chosen, rejected: transcripts with "\\n\\nHuman:" and "\\n\\nAssistant:" before each turn
    preference           prompt, chosen, rejected: each text, or messages of role and content (TRL, OpenRLHF)
    preference_implicit  chosen, rejected: whole conversations, or texts that begin alike; the prompt is the common part
    sharegpt_preference  conversations of from and value, chosen, rejected: one message each (LLaMA-Factory)
    alpaca               instruction, output, and where present input, system and history (pairs of texts)
    messages             messages of role and content, the last one being the reply (OpenAI, TRL)
    prompt_completion    prompt, completion: each text or messages (TRL)
    sharegpt             conversations of from and value, the last one being the reply, and where present system

The first four hold pairs, the others single replies. A `margin` (a number) beside a pair is kept.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

from stages.lib import hh_transcripts
from stages.lib.conversations import (
    Example,
    Message,
    UnusableRowError,
    checked,
    example_from,
    message_from,
    messages_from,
    pair_from,
    text_from,
)
from stages.lib.errors import StageError

Row = dict[str, Any]
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
SHAREGPT_KEYS = ("from", "value")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def read_example(row: Row, name: Format, where: str) -> Example:
    """Read one raw row of format `name`.

    Args:
        where: file and row, for the message of an error.
    Raises:
        StageError: a column is missing or of the wrong type, a role is unknown.
        UnusableRowError: the row is well formed and of no use, such as one with an empty reply.
    """
    columns, reader = READERS[name]
    for column in columns:
        if column not in row:
            raise StageError(
                f"{where}: format '{name}' needs the column '{column}', found {', '.join(row) or 'none'}; "
                "name another format, or say in columns which of yours it is"
            )
    return reader(row, where)


def renamed(row: Row, columns: dict[str, str], where: str) -> Row:
    """The row with its own column names replaced by ours; a column that it maps to takes the place of any other."""
    if not columns:
        return row
    for own in columns:
        if own not in row:
            raise StageError(f"{where}: no column '{own}' to rename, found {', '.join(row) or 'none'}")
    kept = {key: value for key, value in row.items() if key not in columns and key not in columns.values()}
    return kept | {ours: row[own] for own, ours in columns.items()}


def detect_format(row: Row, where: str) -> Format:
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
        known = ", ".join(f"{name} ({', '.join(columns)})" for name, (columns, _) in READERS.items())
        raise StageError(f"{where}: {found} fit no format; say in columns which of yours is which. Known: {known}")
    raise StageError(f"{where}: {found} could be of the formats {' or '.join(candidates)}; name one in format")


def pair_candidates(row: Row) -> list[Format]:
    """The formats of preference pairs that a row can be of."""
    if not {"chosen", "rejected"} <= row.keys():
        return []
    replies = (row["chosen"], row["rejected"])
    if all(hh_transcripts.is_transcript(reply) for reply in replies):
        return ["hh", "preference"] if "prompt" in row else ["hh"]
    named = [name for name in ("preference", "sharegpt_preference") if all(key in row for key in READERS[name][0])]
    if named:
        return named
    if all(isinstance(reply, list) for reply in replies) or row.keys() <= {"chosen", "rejected", "margin"}:
        return ["preference_implicit"]
    # Texts beside columns that we do not know: one of those may be the prompt.
    return ["preference_implicit", "preference"]


def reply_candidates(row: Row) -> list[Format]:
    """The formats of single replies that a row can be of."""
    names: list[Format] = ["alpaca", "messages", "prompt_completion"]
    if not {"chosen", "rejected"} <= row.keys():
        names.append("sharegpt")
    return [name for name in names if all(column in row for column in READERS[name][0])]


def read_hh(row: Row, where: str) -> Example:
    chosen, rejected = (text_from(row[key], f"{where}, '{key}'") for key in ("chosen", "rejected"))
    return pair_from(hh_transcripts.turns(chosen), hh_transcripts.turns(rejected), margin_of(row, where))


def read_preference(row: Row, where: str) -> Example:
    prompt = as_prompt(row["prompt"], f"{where}, 'prompt'")
    chosen, rejected = (as_reply(row[key], prompt, f"{where}, '{key}'") for key in ("chosen", "rejected"))
    return checked(Example(prompt, chosen, rejected, margin_of(row, where)))


def read_preference_implicit(row: Row, where: str) -> Example:
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        return split_texts(chosen, rejected, margin_of(row, where))
    sides = (messages_from(row[key], f"{where}, '{key}'") for key in ("chosen", "rejected"))
    return pair_from(*sides, margin_of(row, where))


def split_texts(chosen: str, rejected: str, margin: float | None) -> Example:
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
    return checked(Example(as_prompt(prompt, ""), chosen[shared:], rejected[shared:], margin))


def read_sharegpt_preference(row: Row, where: str) -> Example:
    prompt = sharegpt_messages(row, where)
    replies = [
        message_from(row[key], f"{where}, '{key}'", SHAREGPT_KEYS, SHAREGPT_ROLES) for key in ("chosen", "rejected")
    ]
    return pair_from([*prompt, replies[0]], [*prompt, replies[1]], margin_of(row, where))


def read_sharegpt(row: Row, where: str) -> Example:
    return example_from(sharegpt_messages(row, where))


def sharegpt_messages(row: Row, where: str) -> list[Message]:
    messages = messages_from(row["conversations"], f"{where}, 'conversations'", SHAREGPT_KEYS, SHAREGPT_ROLES)
    return system_message(row, where) + messages


def read_alpaca(row: Row, where: str) -> Example:
    """An input follows its instruction after an empty line: a template with headings is for models without roles."""
    prompt = system_message(row, where)
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise StageError(f"{where}, 'history': expected a list of pairs of texts (instruction, reply)")
    for turn in history:
        prompt += [
            {"role": role, "content": text_from(text, f"{where}, 'history'")}
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
    parts = [text_from(row.get(key), f"{where}, '{key}'") for key in ("instruction", "input")]
    prompt.append({"role": "user", "content": "\n\n".join(part for part in parts if part.strip())})
    return checked(Example(prompt, text_from(row["output"], f"{where}, 'output'")))


def read_messages(row: Row, where: str) -> Example:
    return example_from(messages_from(row["messages"], f"{where}, 'messages'"))


def read_prompt_completion(row: Row, where: str) -> Example:
    prompt = as_prompt(row["prompt"], f"{where}, 'prompt'")
    return checked(Example(prompt, as_reply(row["completion"], prompt, f"{where}, 'completion'")))


def system_message(row: Row, where: str) -> list[Message]:
    content = text_from(row.get("system"), f"{where}, 'system'")
    return [{"role": "system", "content": content}] if content.strip() else []


def as_prompt(value: Any, where: str) -> list[Message]:
    """A prompt given as messages, or as the text of one user message."""
    if isinstance(value, list):
        return messages_from(value, where)
    content = text_from(value, where)
    return [{"role": "user", "content": content}] if content.strip() else []


def as_reply(value: Any, prompt: list[Message], where: str) -> str:
    """A reply given as text, or as messages: that of the assistant, perhaps after the whole prompt once more."""
    if not isinstance(value, list):
        return text_from(value, where)
    messages = messages_from(value, where)
    if len(messages) > 1 and messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if not messages or messages[-1]["role"] != "assistant":
        raise UnusableRowError("empty_reply")
    if len(messages) > 1:
        raise UnusableRowError("prompt_mismatch")
    return messages[0]["content"]


def margin_of(row: Row, where: str) -> float | None:
    margin = row.get("margin")
    if margin is None:
        return None
    # Tables without types (CSV) hold numbers as text.
    try:
        number = float(margin) if not isinstance(margin, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise StageError(f"{where}, 'margin': expected a finite number, found {margin!r}")
    return number


READERS: dict[Format, tuple[tuple[str, ...], Callable[[Row, str], Example]]] = {
    "hh": (("chosen", "rejected"), read_hh),
    "preference": (("prompt", "chosen", "rejected"), read_preference),
    "preference_implicit": (("chosen", "rejected"), read_preference_implicit),
    "sharegpt_preference": (("conversations", "chosen", "rejected"), read_sharegpt_preference),
    "alpaca": (("instruction", "output"), read_alpaca),
    "messages": (("messages",), read_messages),
    "prompt_completion": (("prompt", "completion"), read_prompt_completion),
    "sharegpt": (("conversations",), read_sharegpt),
}
