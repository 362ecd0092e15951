"""Train and eval splits that share no prompt: each group of prompts falls to one side, whatever rows they are in.

A group is a prompt and all prompts that go on from it: conversations in which its messages are the first ones. Prompts
that are alike after Unicode normalisation (NFKC), in all but case and white space, are one prompt.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping

from stages.lib.command.errors import StageError
from stages.lib.data.conversations import Message

DIGEST_BYTES = 16


def prompt_digests(prompt: Iterable[Message], seed: int) -> list[bytes]:
    """A digest of each beginning of a prompt that ends with the user's message: the shortest first, the whole one last.

    Alike for beginnings that differ only as the module says. Another seed, other digests.
    """
    state = hashlib.blake2b(digest_size=DIGEST_BYTES, key=str(seed).encode())
    digests = []
    for number, turn in enumerate(prompt):
        state.update(f"{chr(0) if number else ''}{turn['role']}\0{normal(turn['content'])}".encode())
        if turn["role"] == "user":
            digests.append(state.copy().digest())
    return digests


def normal(text: str) -> str:
    """The text in one form of each character (Unicode's NFKC), in lower case, with single spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def eval_prompts(beginnings: Mapping[bytes, bytes], eval_fraction: float) -> set[bytes]:
    """The digests of the prompts held out: the groups with the smallest digests, a draw since digests are uniform.

    A group goes by the digest of its shortest prompt. One that is larger than what is still to be held out stays in
    train, so the held-out part has the size asked for unless all groups are larger; then it is the smallest one.
    At least one prompt falls to each side. A group's place hardly depends on other groups, so that more data moves few
    prompts from one side to the other.

    Args:
        beginnings: for each distinct prompt, its digest, and those of its shorter beginnings one after the other.
    Raises:
        StageError: fewer than two groups.
    """
    first_of = {digest: shortest_beginning(digest, beginnings) for digest in beginnings}
    sizes = Counter(first_of.values())
    if len(sizes) < 2:
        found = "1 distinct prompt is" if len(beginnings) == 1 else f"{len(beginnings)} prompts of one conversation are"
        raise StageError(f"{found} left: train and eval need at least one each, give more rows")
    room = min(max(1, round(eval_fraction * len(beginnings))), len(beginnings) - 1)
    held_out = set()
    for first in sorted(sizes):
        if sizes[first] <= room:
            held_out.add(first)
            room -= sizes[first]
    if not held_out:
        held_out.add(min(sizes, key=lambda first: (sizes[first], first)))
    return {digest for digest, first in first_of.items() if first in held_out}


def shortest_beginning(digest: bytes, beginnings: Mapping[bytes, bytes]) -> bytes:
    """The first of a prompt's beginnings that is itself a prompt of the data; its own digest if none is."""
    shorter = beginnings[digest]
    pieces = (shorter[start : start + DIGEST_BYTES] for start in range(0, len(shorter), DIGEST_BYTES))
    return next((piece for piece in pieces if piece in beginnings), digest)
