"""Train and eval splits without a shared prompt: each distinct prompt falls to one side, whatever rows it is in."""

import hashlib
from collections.abc import Iterable

from stages.lib.conversations import Message
from stages.lib.errors import StageError


def prompt_digest(prompt: Iterable[Message], seed: int) -> bytes:
    """16 bytes that are alike for prompts which differ in case and white space only. Another seed, other digests."""
    normal = "\0".join(f"{turn['role']}\0{' '.join(turn['content'].split()).casefold()}" for turn in prompt)
    return hashlib.blake2b(normal.encode(), digest_size=16, key=str(seed).encode()).digest()


def eval_prompts(digests: Iterable[bytes], eval_fraction: float) -> set[bytes]:
    """The digests of the prompts held out: the smallest ones, which is a draw since digests are uniform.

    At least one prompt falls to each side. A prompt's place hardly depends on the other prompts, so that more data
    moves few prompts from one side to the other.

    Raises:
        StageError: fewer than two distinct prompts.
    """
    ordered = sorted(set(digests))
    if len(ordered) < 2:
        raise StageError(
            f"{len(ordered)} distinct prompt is left: train and eval need at least one each, give more rows"
        )
    held_out = min(max(1, round(eval_fraction * len(ordered))), len(ordered) - 1)
    return set(ordered[:held_out])
