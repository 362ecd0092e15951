"""Dialogues of Anthropic's HH-RLHF (arXiv 2204.05862): one text with a marker before each turn."""

import re

from stages.lib.data.conversations import MalformedRowError, Message, UnusableRowError

# Turns hold the bare words "Human:" and "Assistant:" too; only after an empty line do they begin a turn.
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLE_OF = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: object) -> bool:
    """True if `text` begins as every transcript does."""
    return isinstance(text, str) and text.startswith("\n\nHuman:")


def turns(text: str) -> list[Message]:
    """The messages of a transcript, white space around each removed. Drops a text that begins with no marker."""
    before, *parts = TURN.split(text)
    if before.strip() or not parts:
        raise UnusableRowError("not_a_transcript")
    return [
        {"role": ROLE_OF[role], "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def is_prompt_transcript(text: str) -> bool:
    """True if the text of a prompt is a transcript: it begins with a marker, or ends where the assistant's turn begins.

    A prompt's first marker may lack the empty line before it, since many are stripped.
    """
    begins = text.lstrip().startswith("Human:") and TURN.search(text) is not None
    return is_transcript(text) or begins or text.rstrip().endswith("\n\nAssistant:")


def prompt_turns(text: str, where: str) -> list[Message]:
    """The messages of a prompt that is a transcript, without the empty turn of the assistant at its end."""
    stripped = text.lstrip()
    if not stripped.startswith(("Human:", "Assistant:")):
        raise MalformedRowError(
            f"{where}: expected a transcript that begins with 'Human:', found {stripped[:40]!r}; "
            "a text before it may stand in the column 'system'",
            "not_a_transcript",
        )
    messages = turns(f"\n\n{stripped}")
    return messages if messages[-1]["content"] or messages[-1]["role"] == "user" else messages[:-1]


def reply_turn(text: str) -> str:
    """The reply that goes on a transcript, white space around it removed; drops a row where more turns follow."""
    reply, *more = turns(f"\n\nAssistant:{text}")
    if more:
        raise UnusableRowError("prompt_mismatch")
    return reply["content"]
