"""Splits that share no prompt: each group of prompts falls to one of them, whatever rows they are in.

A group is a prompt and all prompts that go on from it: conversations in which its messages are the first ones. Prompts
that are alike after Unicode normalisation (NFKC), in all but case and white space, are one prompt.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from stages.lib.command.errors import StageError
from stages.lib.data.conversations import Message
from stages.lib.data.prepared_rows import Split

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


def held_out_prompts(beginnings: Mapping[bytes, bytes], fractions: Mapping[Split, float]) -> dict[bytes, Split]:
    """The split of each prompt that is held out: groups with small digests, a draw since digests are uniform.

    A group goes by the digest of its shortest prompt. The splits take groups in the order of these digests, one split
    after the other. One that is larger than what a split still lacks stays for the next, and at last for train: so a
    split has the size asked for unless all groups are larger, and then it is the smallest one. At least one prompt
    falls to each side. A group's place hardly depends on other groups, so more data moves few prompts to another split.

    Args:
        beginnings: for each distinct prompt, its digest, and those of its shorter beginnings one after the other.
        fractions: of the distinct prompts, for each split to hold out; one of fraction 0 gets none.
    Raises:
        StageError: fewer groups than splits.
    """
    first_of = {digest: shortest_beginning(digest, beginnings) for digest in beginnings}
    sizes = Counter(first_of.values())
    wanted = [split for split, fraction in fractions.items() if fraction > 0]
    if len(sizes) <= len(wanted):
        found = f"{len(beginnings)} distinct prompt{'' if len(beginnings) == 1 else 's'} of {len(sizes)} conversations"
        raise StageError(
            f"{found} cannot be divided among {' and '.join(['train', *wanted])}, which need at least one each; "
            "give more rows"
        )
    place: dict[bytes, Split] = {}
    for later, split in zip(range(len(wanted), 0, -1), wanted, strict=True):
        place |= dict.fromkeys(groups_for(sizes, place.keys(), round(fractions[split] * len(beginnings)), later), split)
    return {digest: place[first] for digest, first in first_of.items() if first in place}


def groups_for(sizes: Counter[bytes], taken: Collection[bytes], size: int, left: int) -> set[bytes]:
    """The groups that a split of about `size` prompts takes of those not taken, with at least `left` left over."""
    free = sorted(sizes.keys() - taken)
    held_out: set[bytes] = set()
    room = max(1, size)
    for first in free:
        if sizes[first] <= room and len(held_out) < len(free) - left:
            held_out.add(first)
            room -= sizes[first]
    return held_out or {min(free, key=lambda first: (sizes[first], first))}


def shortest_beginning(digest: bytes, beginnings: Mapping[bytes, bytes]) -> bytes:
    """The first of a prompt's beginnings that is itself a prompt of the data; its own digest if none is."""
    shorter = beginnings[digest]
    pieces = (shorter[start : start + DIGEST_BYTES] for start in range(0, len(shorter), DIGEST_BYTES))
    return next((piece for piece in pieces if piece in beginnings), digest)
