"""Conversations, and what one raw row says for training: a prompt and the replies to it, or a whole text.

A message is a role (system, user, assistant, tool) and a content, which is text; and where present

    tool_calls     of the assistant: [{"type": "function", "function": {"name", "arguments": an object}, "id"?}]
    tool_call_id   of a tool: the call that it answers
    name           of a tool, or of who speaks
    weight         of the assistant: 0 or 1, whether the turn is trained
    reasoning_content, reasoning, thinking    of the assistant: what templates of reasoning models read

A prompt is an optional system message, then user and assistant in turn, where tools may answer the assistant; its last
message is the user's or a tool's: the order that chat templates render. A reply is the one message of the assistant
that follows.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any

from stages.lib.data.row_errors import MalformedRowError, UnusableRowError
from stages.lib.data.tool_calls import calls_from

LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
# Which role may follow which; "" is before the first message but for the system's.
FOLLOWING = {"": {"user"}, "user": {"assistant"}, "assistant": {"user", "tool"}, "tool": {"assistant", "tool"}}
Message = dict[str, Any]
CALLS = "function_call"  # the role under which ShareGPT has the assistant's calls, as JSON text
# Roles in the words of OpenAI, TRL, ShareGPT, OpenAssistant and Gemma.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    CALLS: "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
NAMES_OF_KEYS = (("role", "content"), ("from", "value"))
TEXT_KEYS = ("tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
CALL_KEYS = ("tool_calls", "function_call")  # the second is OpenAI's older name
OF_THE_ASSISTANT = (*CALL_KEYS, "weight", "reasoning_content", "reasoning", "thinking")
READ_KEYS = frozenset({*(name for names in NAMES_OF_KEYS for name in names), *TEXT_KEYS, *CALL_KEYS, "weight"})


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def messages_from(value: Any, where: str) -> list[Message]:
    """Check a list of messages and give them our keys and roles.

    Raises:
        MalformedRowError: not a list, a message without role and content, an unknown role, a content that is not text,
            a key of `READ_KEYS` with a value that it cannot have.
    """
    if not isinstance(value, list):
        raise MalformedRowError(f"{where}: expected a list of messages, found {type(value).__name__}", "not_messages")
    return [message_from(item, f"{where}, message {number}") for number, item in enumerate(value, 1)]


def message_from(value: Any, where: str) -> Message:
    """Check one message; errors as for `messages_from`."""
    role_key, content_key = names_of_keys(value, where)
    given_role = value[role_key]
    role = role_from(given_role, where)
    if role != "assistant":
        for key in OF_THE_ASSISTANT:
            if value.get(key):  # a weight of 0 says what is so
                raise MalformedRowError(f"{where}: the key '{key}' belongs to the assistant, not to {role}", "bad_key")
    content, place = value.get(content_key), f"{where}, '{content_key}'"
    if given_role == CALLS:
        return {"role": role, "content": "", "tool_calls": calls_from(content, place)} | other_keys(value, role, where)
    return {"role": role, "content": content_from(content, place)} | other_keys(value, role, where)


def names_of_keys(value: Any, where: str) -> tuple[str, str]:
    """The keys under which a message holds its role and its content; the content may be left out beside calls."""
    if isinstance(value, dict):
        for role_key, content_key in NAMES_OF_KEYS:
            if role_key in value and (content_key in value or value.get("tool_calls") or value.get("function_call")):
                return role_key, content_key
    keys = value.keys() if isinstance(value, dict) else set()
    found = f"keys {', '.join(keys)}" if isinstance(value, dict) else type(value).__name__
    role_key, content_key = next((names for names in NAMES_OF_KEYS if {*names} & keys), NAMES_OF_KEYS[0])
    expected = f"'{role_key}' and '{content_key}'"
    raise MalformedRowError(f"{where}: expected a message with {expected}, found {found}", "not_messages")


def role_from(role: Any, where: str) -> str:
    """Our name for a role. Raises MalformedRowError for an unknown one."""
    if not isinstance(role, str) or role not in ROLES:
        found = f"unknown role {role!r}" if isinstance(role, str) else f"a role that is {type(role).__name__}"
        raise MalformedRowError(f"{where}: {found}, expected one of: {', '.join(ROLES)}", "unsupported_role")
    return ROLES[role]


def other_keys(value: dict[str, Any], role: str, where: str) -> Message:
    """What a message says beside its role and content. Null or nothing is what tables write where a key is not set."""
    kept: Message = {}
    for key in CALL_KEYS:
        if value.get(key):
            kept["tool_calls"] = calls_from(value[key], f"{where}, '{key}'")
    for key in TEXT_KEYS:
        if value.get(key):
            kept[key] = text_from(value[key], f"{where}, '{key}'")
    weight = value.get("weight")
    if weight is not None:
        if isinstance(weight, bool) or weight not in (0, 1):
            raise MalformedRowError(f"{where}, 'weight': expected 0 or 1, found {weight!r}", "bad_weight")
        kept |= {"weight": int(weight)} if role == "assistant" else {}
    return kept


def content_from(value: Any, where: str) -> str:
    """The text of a content that is text, or a list of parts of type text, which are joined as templates join them."""
    if not isinstance(value, list):
        return text_from(value, where)
    for number, part in enumerate(value, start=1):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            found = f"type {part.get('type')!r}" if isinstance(part, dict) else type(part).__name__
            raise MalformedRowError(
                f"{where}, part {number}: expected text, or a part of type 'text', found {found}", "content_not_text"
            )
    return "".join(part["text"] for part in value)


def text_from(value: Any, where: str) -> str:
    """Text, where null is the empty text (as tables write it). Raises MalformedRowError for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise MalformedRowError(f"{where}: expected text, found {type(value).__name__}", "content_not_text")
    return value


def has_content(message: Message) -> bool:
    """False if a message says nothing, be it in words or in calls."""
    return bool(message["content"].strip() or message.get("tool_calls"))


def is_unicode(value: Any) -> bool:
    """False if a text holds half a surrogate pair, which JSON can escape and no file in UTF-8 can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Example:
    """What a raw row says: a prompt with one reply, a pair of them or none; or a text alone."""

    prompt: list[Message] = field(default_factory=list)
    reply: Message | None = None
    rejected: Message | None = None  # the reply to which `reply` was preferred
    margin: float | None = None  # of a pair
    label: bool | None = None  # of unpaired data: whether `reply` is a good one
    score: float | None = None  # of unpaired data: what the label was made of, where that is a score
    text: str | None = None  # for whole-text training or as a raw prompt; all of the above is unset then
    facts: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    template_arguments: dict[str, Any] | None = None


def number_from(value: Any) -> float | None:
    """A finite number, also one written as text as tables without types (CSV) hold it; None for anything else."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):  # the last one: a whole number of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def margin_from(value: Any, where: str) -> float | None:
    """The margin of a pair: a finite number of at least 0 that float32 holds, or null.

    Tables without types (CSV) hold a number as text, and null as the empty text.

    Raises:
        MalformedRowError: anything else, true and false included.
    """
    if value is None or value == "":
        return None
    number = number_from(value)
    if number is None or not 0 <= number <= LARGEST_FLOAT32:
        found = repr(value) if isinstance(value, str | int | float) else type(value).__name__
        raise MalformedRowError(
            f"{where}, 'margin': expected a finite number of at least 0 that float32 holds, found {found}", "bad_margin"
        )
    return number


def example_from(messages: list[Message]) -> Example:
    """Prompt and reply of a conversation that ends with the assistant's message; drops the row if it does not."""
    return Example(messages[:-1], reply_of(messages))


def reply_of(messages: list[Message]) -> Message:
    """A conversation's last message; drops the row if that is not the assistant's."""
    if not messages:
        raise UnusableRowError("empty_reply")
    if messages[-1]["role"] != "assistant":
        raise UnusableRowError(f"ends_with_{messages[-1]['role']}")
    return messages[-1]


def pair_from(chosen: list[Message], rejected: list[Message]) -> Example:
    """A pair from two whole conversations: their common part is the prompt, the last message of each a reply.

    Conversations that part before their last message are dropped: their replies answer different prompts.
    """
    for conversation in (chosen, rejected):
        if not has_content(reply_of(conversation)):
            raise UnusableRowError("empty_reply")
    if chosen[:-1] != rejected[:-1]:
        raise UnusableRowError("prompt_mismatch")
    return Example(chosen[:-1], chosen[-1], rejected[-1])


def checked(example: Example) -> Example:
    """The example, or UnusableRowError with the first rule that it breaks."""
    if example.text is not None:
        if not example.text.strip():
            raise UnusableRowError("empty_text")
        if not is_unicode(example.text):
            raise UnusableRowError("invalid_unicode")
        return example
    replies = [reply for reply in (example.reply, example.rejected) if reply is not None]
    if not all(has_content(reply) for reply in replies):
        raise UnusableRowError("empty_reply")
    if example.rejected is not None and example.reply == example.rejected:
        raise UnusableRowError("equal_replies")
    if all(message["role"] == "system" for message in example.prompt):
        raise UnusableRowError("empty_prompt")
    if not all(has_content(message) or message["role"] == "tool" for message in example.prompt):
        raise UnusableRowError("empty_message")
    if not takes_turns(example.prompt):
        raise UnusableRowError("not_alternating")
    if not is_unicode([example.prompt, replies, example.tools, example.template_arguments]):
        raise UnusableRowError("invalid_unicode")
    return example


def takes_turns(prompt: list[Message]) -> bool:
    """True if the roles follow each other as templates expect, and the assistant's turn comes next."""
    roles = [message["role"] for message in prompt]
    before = "" if roles[0] == "system" else None
    turns = roles if before is None else roles[1:]
    in_order = all(role in FOLLOWING[last] for last, role in zip(["", *turns], turns, strict=False))
    return in_order and turns[-1] != "assistant"
