"""Prepared rows: what prepare_data writes and tokenize_data reads, as JSON lines in `<split>/<kind>.jsonl`.

sft         {"messages": [...]}                     a prompt and its reply; or {"text"}, trained on as a whole
preference  {"prompt", "chosen", "rejected"}        one reply each, and "margin" where there is one
unpaired    {"prompt", "completion", "label"}       one reply, and whether it is a good one
prompts     {"prompt"}                              or {"text"}, which no template is laid around

Each has "source", the name of its source, and where there are any "facts", an object of what is known of the row;
"tools", which the chat template lists; and "template_arguments", which it is given. A source's own rows, which
read_source writes and prepare_data reads, have "kind" besides, and "split" where the source decides it.
"""

from typing import Any, Literal, NamedTuple, get_args

from stages.lib.command.errors import StageError
from stages.lib.data.conversations import Message, assistant, margin_from, messages_from
from stages.lib.data.prompts import facts_from

Kind = Literal["sft", "preference", "unpaired", "prompts"]
Split = Literal["train", "validation", "test"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SPLITS: tuple[Split, ...] = get_args(Split)


class PreparedRow(NamedTuple):
    """A row to be written: what its line holds, and to which file it goes."""

    kind: Kind
    split: Split
    values: dict[str, Any]


def preference_pair(prompt: list[Message], chosen: str, rejected: str, margin: float | None = None) -> dict[str, Any]:
    """What a row of kind preference holds."""
    pair = {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    return pair if margin is None else pair | {"margin": margin}


class Conversation(NamedTuple):
    """A prepared row, read and checked."""

    prompt: list[Message]
    replies: list[Message]  # one, a chosen and a rejected one, or none
    margin: float | None
    facts: dict[str, Any]


def sft_conversation(row: dict[str, Any], where: str) -> Conversation:
    messages = _messages(row, "messages", where)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise StageError(f"{where}: 'messages' must hold a prompt and end with the assistant's reply")
    return Conversation(messages[:-1], [_with_text(messages[-1], where)], None, {})


def preference_conversation(row: dict[str, Any], where: str) -> Conversation:
    prompt = _prompt(row, where)
    pair = []
    for name in ("chosen", "rejected"):
        replies = _messages(row, name, where)
        if len(replies) != 1 or replies[0]["role"] != "assistant":
            raise StageError(f"{where}: '{name}' must hold exactly one message, the assistant's")
        pair.append(_with_text(replies[0], where))
    return Conversation(prompt, pair, margin_from(row.get("margin"), where), {})


def prompt_conversation(row: dict[str, Any], where: str) -> Conversation:
    facts = facts_from(row["facts"], f"{where}, 'facts'") if "facts" in row else {}
    return Conversation(_prompt(row, where), [], None, facts)


def _messages(row: dict[str, Any], key: str, where: str) -> list[Message]:
    if key not in row:
        raise StageError(f"{where}: '{key}' is missing (the row has {', '.join(row) or 'no keys'})")
    return messages_from(row[key], f"{where}, '{key}'")


def _prompt(row: dict[str, Any], where: str) -> list[Message]:
    prompt = _messages(row, "prompt", where)
    if not prompt or prompt[-1]["role"] == "assistant":
        raise StageError(f"{where}: 'prompt' must hold messages and not end with the assistant's")
    return prompt


def _with_text(reply: Message, where: str) -> Message:
    if not reply["content"].strip():
        raise StageError(f"{where}: the reply is empty")
    return reply
