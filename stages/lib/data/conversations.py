"""Conversations as prepared rows hold them: messages of a role and a content, and the replies to a prompt.

A prompt is an optional system message, then user and assistant in turn, the last message being the user's: the order
that chat templates render. A reply is the text of the one assistant message that follows.
"""

import math
from dataclasses import dataclass
from typing import Any

from stages.lib.command.errors import StageError

LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
Message = dict[str, Any]
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


class UnusableRowError(Exception):
    """A row that a rule leaves out; its only argument is the reason under which it is counted."""


class MalformedRowError(StageError):
    """A row that says something which cannot be read. `reason` is what it is counted by where such rows are dropped."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


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
        MalformedRowError: not a list, a message without both keys, a role that is not in `roles`, a content that is not
            text.
    """
    if not isinstance(value, list):
        raise MalformedRowError(f"{where}: expected a list of messages, found {type(value).__name__}", "not_messages")
    return [message_from(item, f"{where}, message {number}", names, roles) for number, item in enumerate(value, 1)]


def message_from(
    value: Any, where: str, names: tuple[str, str] = ("role", "content"), roles: dict[str, str] = ROLES
) -> Message:
    """Check one message; arguments and errors as for `messages_from`."""
    role_key, content_key = names
    if not isinstance(value, dict) or role_key not in value or content_key not in value:
        found = f"keys {', '.join(value)}" if isinstance(value, dict) else type(value).__name__
        raise MalformedRowError(
            f"{where}: expected a message with '{role_key}' and '{content_key}', found {found}", "not_messages"
        )
    role = value[role_key]
    if not isinstance(role, str) or role not in roles:
        found = f"unknown role {role!r}" if isinstance(role, str) else f"a role that is {type(role).__name__}"
        raise MalformedRowError(f"{where}: {found}, expected one of: {', '.join(roles)}", "unsupported_role")
    return {"role": roles[role], "content": text_from(value[content_key], f"{where}, '{content_key}'")}


def text_from(value: Any, where: str) -> str:
    """Text, where null is the empty text (as tables write it). Raises MalformedRowError for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise MalformedRowError(f"{where}: expected text, found {type(value).__name__}", "content_not_text")
    return value


def margin_from(value: Any, where: str) -> float | None:
    """The margin of a pair: a finite number of at least 0 that float32 holds, or null.

    Tables without types (CSV) hold a number as text, and null as the empty text.

    Raises:
        MalformedRowError: anything else, true and false included.
    """
    if value is None or value == "":
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    if not 0 <= number <= LARGEST_FLOAT32:
        found = repr(value) if isinstance(value, str | int | float) else type(value).__name__
        raise MalformedRowError(
            f"{where}, 'margin': expected a finite number of at least 0 that float32 holds, found {found}", "bad_margin"
        )
    return number


def example_from(messages: list[Message]) -> Example:
    """Prompt and reply of a conversation that ends with the assistant's message; drops the row if it does not."""
    return checked(Example(messages[:-1], reply_of(messages)))


def reply_of(messages: list[Message]) -> str:
    """The content of a conversation's last message; drops the row if that is not the assistant's."""
    if not messages:
        raise UnusableRowError("empty_reply")
    if messages[-1]["role"] != "assistant":
        raise UnusableRowError(f"ends_with_{messages[-1]['role']}")
    return messages[-1]["content"]


def pair_from(chosen: list[Message], rejected: list[Message]) -> Example:
    """A pair from two whole conversations: their common part is the prompt, the last message of each a reply.

    Conversations that part before their last message are dropped: their replies answer different prompts.
    """
    for conversation in (chosen, rejected):
        if not reply_of(conversation).strip():
            raise UnusableRowError("empty_reply")
    if chosen[:-1] != rejected[:-1]:
        raise UnusableRowError("prompt_mismatch")
    return checked(Example(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]))


def checked(example: Example) -> Example:
    """The example, or UnusableRowError with the first rule that it breaks."""
    if not example.reply.strip() or (example.rejected is not None and not example.rejected.strip()):
        raise UnusableRowError("empty_reply")
    if example.reply == example.rejected:
        raise UnusableRowError("equal_replies")
    if all(message["role"] == "system" for message in example.prompt):
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
