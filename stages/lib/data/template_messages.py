"""Messages as chat templates take them: a role, a content, and what else some of them know."""

from collections.abc import Callable
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.data.conversations import Message

ROLES_OF_TEMPLATES = ("system", "user", "assistant", "tool")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _are_calls(value: Any) -> bool:
    return is_list_of_objects(value) and all(isinstance(call.get("function", call), dict) for call in value)


# A key that a message may have beside its role and content → what its value must be, and the words for it.
OPTIONAL_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys((*REASONING_FIELDS, "name", "tool_call_id"), (_is_text, "text")),
    "tool_calls": (_are_calls, "a list of calls"),
    "weight": (lambda value: type(value) in (int, float) and value in (0, 1), "0 or 1"),
}


def template_messages(value: Any, where: str) -> list[Message]:
    """Check the messages of a prepared row. Raises a StageError, beginning with `where`, for what is none."""
    if not isinstance(value, list):
        raise StageError(f"{where}: expected a list of messages, found {type(value).__name__}")
    return [_checked(message, f"{where}, message {number}") for number, message in enumerate(value, 1)]


def _checked(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        found = f"keys {', '.join(message)}" if isinstance(message, dict) else type(message).__name__
        raise StageError(f"{where}: expected a message with 'role' and 'content', found {found}")
    if message["role"] not in ROLES_OF_TEMPLATES:
        raise StageError(f"{where}: unknown role {message['role']!r}, expected one of: {', '.join(ROLES_OF_TEMPLATES)}")
    if not isinstance(message["content"], str):
        raise StageError(f"{where}, 'content': expected text, found {type(message['content']).__name__}")
    if len(message) > 2:
        _check_optional(message, where)
    if next(iter(message)) == "role":
        return message
    return {"role": message["role"], "content": message["content"], **message}  # as people write them


def _check_optional(message: Message, where: str) -> None:
    for key, value in message.items():
        if key in ("role", "content"):
            continue
        if key not in OPTIONAL_KEYS:
            raise StageError(f"{where}: nothing reads the key '{key}'; expected {', '.join(OPTIONAL_KEYS)}")
        holds, words = OPTIONAL_KEYS[key]
        if not holds(value):
            raise StageError(f"{where}, '{key}': expected {words}, found {value!r}"[:300])
