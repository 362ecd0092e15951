"""Prepared rows, read and checked: a prompt and what answers it, or a plain text."""

from typing import Any, NamedTuple

from stages.lib.command.errors import StageError
from stages.lib.data.chat import NO_CONTEXT, Context
from stages.lib.data.conversations import Message, has_content, margin_from, messages_from
from stages.lib.data.prompts import facts_from
from stages.lib.data.readers.comparisons import require_float32, score_from
from stages.lib.data.tool_calls import refuse_arguments_of_the_renderer

PLAIN_ROLES = ("system", "user", "assistant")


class Conversation(NamedTuple):
    """A prepared row."""

    source: str
    prompt: list[Message]
    replies: list[Message]  # one, a chosen and a rejected one, or none
    context: Context = NO_CONTEXT
    margin: float | None = None
    label: bool | None = None
    score: float | None = None
    weights: list[int] | None = None  # of the prompt's messages and the reply, where one of them has a weight
    facts: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    text: str | None = None  # in place of prompt and reply


def sft_conversation(row: dict[str, Any], where: str) -> Conversation:
    if "text" in row:
        return Conversation(_source(row, where), [], [], text=_text(row, where))
    messages = _messages(row, "messages", where)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise StageError(f"{where}: 'messages' must hold a prompt and end with the assistant's reply")
    weights = None
    if any("weight" in message for message in messages):
        weights = [int(message.get("weight", 1)) for message in messages]
        messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    *prompt, reply = messages
    return Conversation(_source(row, where), prompt, [_with_text(reply, where)], _context(row, where), weights=weights)


def preference_conversation(row: dict[str, Any], where: str) -> Conversation:
    pair = [_reply(row, name, where) for name in ("chosen", "rejected")]
    margin, facts = margin_from(row.get("margin"), where), _facts(row, where)
    prompt = _prompt(row, where)
    return Conversation(_source(row, where), prompt, pair, _context(row, where), margin=margin, facts=facts)


def unpaired_conversation(row: dict[str, Any], where: str) -> Conversation:
    reply, label = _reply(row, "completion", where), row.get("label")
    if not isinstance(label, bool):
        raise StageError(f"{where}: 'label' must be true or false, found {label!r}"[:300])
    score = score_from(row.get("score"), f"{where}, 'score'")
    if score is not None:
        require_float32(score, f"{where}, 'score'")
    return Conversation(
        _source(row, where), _prompt(row, where), [reply], _context(row, where), label=label, score=score
    )


def prompt_conversation(row: dict[str, Any], where: str) -> Conversation:
    facts = _facts(row, where)
    if "text" in row:
        return Conversation(_source(row, where), [], [], facts=facts, text=_text(row, where))
    return Conversation(_source(row, where), _prompt(row, where), [], _context(row, where), facts=facts)


def _source(row: dict[str, Any], where: str) -> str:
    source = row.get("source")
    if not isinstance(source, str):
        raise StageError(f"{where}: 'source', the name of the row's source, is missing; run prepare_data again")
    return source


def _facts(row: dict[str, Any], where: str) -> dict[str, Any]:
    return facts_from(row["facts"], f"{where}, 'facts'") if "facts" in row else {}


def _text(row: dict[str, Any], where: str) -> str:
    text = row["text"]
    if not isinstance(text, str) or not text.strip():
        raise StageError(f"{where}: 'text' must be text, and not empty")
    return text


def _context(row: dict[str, Any], where: str) -> Context:
    tools, arguments = row.get("tools"), row.get("template_arguments")
    if tools is None and arguments is None:
        return NO_CONTEXT
    are_tools = isinstance(tools, list) and all(
        isinstance(tool, dict) and isinstance(tool.get("function", tool), dict) for tool in tools
    )
    if tools is not None and not are_tools:
        raise StageError(f"{where}, 'tools': expected a list of objects, each the JSON schema of a tool")
    if arguments is not None and not isinstance(arguments, dict):
        raise StageError(f"{where}, 'template_arguments': expected an object, found {type(arguments).__name__}")
    refuse_arguments_of_the_renderer(arguments or {}, f"{where}, 'template_arguments'")
    return Context(tools, arguments)


def _messages(row: dict[str, Any], key: str, where: str) -> list[Message]:
    if key not in row:
        raise StageError(f"{where}: '{key}' is missing (the row has {', '.join(row) or 'no keys'})")
    value = row[key]
    if isinstance(value, list) and all(map(_is_plain, value)):
        return value
    return messages_from(value, f"{where}, '{key}'")


def _is_plain(message: Any) -> bool:
    """True for a role and a text, as nearly all messages are, of which there are millions."""
    if not isinstance(message, dict) or len(message) != 2:
        return False
    return message.get("role") in PLAIN_ROLES and isinstance(message.get("content"), str)


def _prompt(row: dict[str, Any], where: str) -> list[Message]:
    prompt = _messages(row, "prompt", where)
    if not prompt or prompt[-1]["role"] == "assistant":
        raise StageError(f"{where}: 'prompt' must hold messages and not end with the assistant's")
    return prompt


def _reply(row: dict[str, Any], key: str, where: str) -> Message:
    replies = _messages(row, key, where)
    if len(replies) != 1 or replies[0]["role"] != "assistant":
        raise StageError(f"{where}: '{key}' must hold exactly one message, the assistant's")
    return _with_text(replies[0], where)


def _with_text(reply: Message, where: str) -> Message:
    if not has_content(reply):
        raise StageError(f"{where}: the reply is empty")
    return reply
