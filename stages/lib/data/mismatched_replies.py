"""Mismatched replies: beside each prompt of a table of unpaired rows a reply that was given to another prompt.

KTO estimates the KL of policy and reference on such pairs (arXiv 2402.01306, section 4.2). They are fixed with the
table, so that the reference's log-probs of them can be computed once, and no batch decides what is paired with what.
"""

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa


class Mismatched(NamedTuple):
    """What was written of a table."""

    cut: int  # rows whose mismatched reply lost its end, so that it fits behind their prompt
    missing: int  # rows that have none


def mismatched_places(prompts: Sequence[Hashable], seed: int) -> list[int | None]:
    """For each row the place of another one with another prompt: a permutation, drawn by the seed.

    Rows stand in groups of one prompt, the groups in a drawn order, and each row gets the reply that stands as many
    places further, in a circle, as the largest group has rows. If that is more than half of them, as few rows as can be
    (twice its size less their number) have nothing but their own prompt's replies: they get None.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(place)
    draw = np.random.Generator(np.random.Philox(key=[seed, 0]))
    members = list(groups.values())
    order = list(chain.from_iterable(members[group] for group in draw.permutation(len(members))))
    shift = max(map(len, members), default=0)
    found: list[int | None] = [None] * len(order)
    for number, place in enumerate(order):
        other = order[(number + shift) % len(order)]
        if prompts[other] != prompts[place]:
            found[place] = other
    return found


def add_mismatched(path: Path, seed: int, max_length: int) -> Mismatched:
    """Fill the column `mismatched_ids` of a table of `UNPAIRED_SCHEMA`, null where a row has no other prompt's reply.

    Args:
        max_length: tokens of prompt and reply; what is beyond is cut off the reply's end.
    """
    cut = missing = 0
    partial = path.with_name(f"{path.name}.partial")
    with pa.memory_map(str(path)) as source:
        stream = pa.ipc.open_stream(source)
        table = stream.read_all()
        prompts, replies = table["prompt_ids"], table["completion_ids"]
        places = iter(mismatched_places([*digests(prompts)], seed))
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, stream.schema) as written:
            for batch in table.to_batches():
                column = []
                for prompt, place in zip(batch["prompt_ids"], places, strict=False):
                    reply = None if place is None else replies[place].as_py()
                    room = max_length - len(prompt)
                    missing += reply is None
                    cut += reply is not None and len(reply) > room
                    column.append(reply if reply is None else reply[:room])
                number = batch.schema.get_field_index("mismatched_ids")
                written.write_batch(
                    batch.set_column(number, batch.schema.field(number), pa.array(column, batch.schema.types[number]))
                )
    partial.replace(path)
    return Mismatched(cut, missing)


def digests(lists: pa.ChunkedArray) -> Iterator[bytes]:
    """What tells one list of ids from another, in 16 bytes."""
    for ids in lists:
        yield hashlib.blake2b(ids.values.to_numpy().tobytes(), digest_size=16).digest()
