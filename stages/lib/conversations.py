"""Conversations as prepared rows hold them: messages of a role and a content, and the replies to a prompt.

A prompt is an optional system message, then user and assistant in turn, the last message being the user's: the order
that chat templates render. A reply is the text of the one assistant message that follows.
"""

from dataclasses import dataclass
from typing import Any

from stages.lib.errors import StageError

Message = dict[str, str]
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}


class UnusableRowError(Exception):
    """A row that a rule leaves out; its only argument is the reason under which it is counted."""


@dataclass(frozen=True, slots=True)
class Example:
    """One raw row, read: a prompt and its reply, and the reply it was preferred to where there is one."""

    prompt: list[Message]
    reply: str
    rejected: str | None = None
    margin: float | None = None


def messages_from(
    value: Any, where: str, names: tuple[str, str] = ("role", "content"), roles: dict[str, str] = ROLES
) -> list[Message]:
    """Check a list of messages and give them our keys and roles.

    Args:
        names: the keys under which a message holds its role and its text.
        roles: the roles allowed, and our name for each.
    Raises:
        StageError: no list, a message without both keys, a role that is not in `roles`, a content that is not text.
    """
    if not isinstance(value, list):
        raise StageError(f"{where}: expected a list of messages, found {type(value).__name__}")
    return [message_from(item, f"{where}, message {number}", names, roles) for number, item in enumerate(value, 1)]


def message_from(
    value: Any, where: str, names: tuple[str, str] = ("role", "content"), roles: dict[str, str] = ROLES
) -> Message:
    """Check one message; arguments and errors as for `messages_from`."""
    role_key, content_key = names
    if not isinstance(value, dict) or role_key not in value or content_key not in value:
        found = f"keys {', '.join(value)}" if isinstance(value, dict) else type(value).__name__
        raise StageError(f"{where}: expected a message with '{role_key}' and '{content_key}', found {found}")
    role = value[role_key]
    if role not in roles:
        raise StageError(f"{where}: unknown role {role!r}, expected one of: {', '.join(roles)}")
    return {"role": roles[role], "content": text_from(value[content_key], f"{where}, '{content_key}'")}


def text_from(value: Any, where: str) -> str:
    """Text, where null is the empty text (as tables write it). Raises StageError for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise StageError(f"{where}: expected text, found {type(value).__name__}")
    return value


def example_from(messages: list[Message], margin: float | None = None) -> Example:
    """Prompt and reply of a conversation that ends with the assistant's message; drops the row if it does not."""
    if not messages or messages[-1]["role"] != "assistant":
        raise UnusableRowError("empty_reply")
    return checked(Example(messages[:-1], messages[-1]["content"], margin=margin))


def pair_from(chosen: list[Message], rejected: list[Message], margin: float | None = None) -> Example:
    """A pair from two whole conversations: their common part is the prompt, the last message of each a reply.

    Conversations that part before their last message are dropped: their replies answer different prompts.
    """
    for conversation in (chosen, rejected):
        if not conversation or conversation[-1]["role"] != "assistant" or not conversation[-1]["content"].strip():
            raise UnusableRowError("empty_reply")
    if chosen[:-1] != rejected[:-1]:
        raise UnusableRowError("prompt_mismatch")
    return checked(Example(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], margin))


def checked(example: Example) -> Example:
    """The example, or UnusableRowError with the first rule that it breaks."""
    if not example.reply.strip() or (example.rejected is not None and not example.rejected.strip()):
        raise UnusableRowError("empty_reply")
    if example.reply == example.rejected:
        raise UnusableRowError("equal_replies")
    if not example.prompt:
        raise UnusableRowError("empty_prompt")
    if not all(message["content"].strip() for message in example.prompt):
        raise UnusableRowError("empty_message")
    if not takes_turns(example.prompt):
        raise UnusableRowError("not_alternating")
    if not is_unicode(example):
        raise UnusableRowError("invalid_unicode")
    return example


def is_unicode(example: Example) -> bool:
    """False if a text holds half a surrogate pair, which JSON can escape and no file in UTF-8 can hold."""
    texts = [message["content"] for message in example.prompt] + [example.reply, example.rejected or ""]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def takes_turns(prompt: list[Message]) -> bool:
    """True if user and assistant alternate, after a system message or none, from user to user."""
    turns = prompt[1:] if prompt[0]["role"] == "system" else prompt
    expected = ("user", "assistant")
    return len(turns) % 2 == 1 and all(turn["role"] == expected[index % 2] for index, turn in enumerate(turns))
