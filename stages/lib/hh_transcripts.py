"""Dialogues of Anthropic's HH-RLHF (arXiv 2204.05862): one text with a marker before each turn."""

import re

from stages.lib.conversations import Message, UnusableRowError

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
