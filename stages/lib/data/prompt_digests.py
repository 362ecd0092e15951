"""What a prompt is known by: digests of it and of its beginnings, and of the text of a row in one form.

Prompts that are alike after Unicode normalisation (NFKC), in all but case and white space, are one prompt.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from typing import Any

from stages.lib.data.conversations import Message
from stages.lib.data.prepared_rows import Kind

DIGEST_BYTES = 16
SAID_BESIDE = ("tool_calls", "tool_call_id", "name")  # keys by which messages of equal text differ
OF_A_ROW = ("messages", "text", "prompt", "chosen", "rejected", "completion", "label", "tools", "template_arguments")


def prompt_digests(prompt: Iterable[Message], seed: int) -> list[bytes]:
    """A digest of each beginning of a prompt that ends with the user's message, the shortest first; the whole one last.

    Alike for beginnings that differ only as the module says. Another seed, other digests.
    """
    state = hashlib.blake2b(digest_size=DIGEST_BYTES, key=str(seed).encode())
    digests, role = [], ""
    for number, turn in enumerate(prompt):
        role = turn["role"]
        beside = {key: turn[key] for key in SAID_BESIDE if turn.get(key)}
        said = json.dumps(beside, sort_keys=True) if beside else ""
        state.update(f"{chr(0) if number else ''}{role}\0{normal(turn['content'] or '')}{said}".encode())
        if role == "user":
            digests.append(state.copy().digest())
    return digests if role == "user" else [*digests, state.digest()]


def digests_of_row(values: dict[str, Any], seed: int) -> list[bytes]:
    """The digests of a prepared row's prompt, as `prompt_digests`; of a text without roles its own."""
    if "text" in values:
        return prompt_digests([{"role": "text", "content": values["text"]}], seed)
    if "messages" in values:
        messages = values["messages"]
        ends_with_reply = len(messages) > 1 and messages[-1]["role"] == "assistant"
        return prompt_digests(messages[:-1] if ends_with_reply else messages, seed)
    return prompt_digests(values["prompt"], seed)


def content_digest(values: dict[str, Any], kind: Kind, prompt: bytes) -> bytes:
    """A digest of all that a row trains on, by which exact duplicates are known; prompts are known as prompts are.

    Margins, scores and facts are not in it: two rows that differ in these alone are duplicates.
    """
    said: dict[str, Any] = {name: values[name] for name in OF_A_ROW if name in values}
    if kind == "prompts":
        said |= dict.fromkeys(("prompt", "text"), prompt.hex())
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=DIGEST_BYTES).digest()


def normal(text: str) -> str:
    """The text in one form of each character (Unicode's NFKC), in lower case, with single spaces."""
    if text.isascii():
        return " ".join(text.lower().split())
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())
