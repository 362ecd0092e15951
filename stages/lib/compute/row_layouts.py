"""What lies in the rows of a forward pass: sequences, or a prompt with several replies behind it, padded or end to end.

Replies behind one prompt, here two. Each begins with the prompt's last token, from whose state its first token is
predicted; so the prompt of p tokens counts once, and its last token once for each reply:

    ids        x_1 … x_{p-1}   x_p y_1 … y_c   x_p z_1 … z_r
    positions  0 … p-2         p-1 … p-1+c     p-1 … p-1+r
    parts      1 … 1           2 … 2           3 … 3

A token sees those before it of its own part and of the prompt (`lib/models/attention_masks.py`), so every state is that
of the reply alone. In a row with several prompts the parts of the second one are as many
more as `PARTS` says, and so on.
"""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from stages.lib.models.attention_masks import PARTS, PROMPT

Values = TypeVar("Values")


class Laid(NamedTuple, Generic[Values]):
    """Tokens of a row or a stretch of one, each array of shape (tokens,), or of a batch: (rows, tokens)."""

    ids: Values
    positions: Values
    parts: Values  # as above; all of a sequence that shares nothing is 1, and padding 0
    completions: Values  # True on completion tokens
    ends: Values  # at the last token of a sequence its number in the batch, from 1 on; else 0


Row = Laid[np.ndarray]


def sequence_row(ids: Sequence[int], mask: Sequence[int], number: int) -> Row:
    """A row of one sequence, of which `mask` marks the completion tokens with 1."""
    ends = np.zeros(len(ids), dtype=np.int64)
    ends[-1] = number
    parts = np.full(len(ids), PROMPT, dtype=np.int64)
    return Laid(np.asarray(ids, np.int64), np.arange(len(ids)), parts, np.asarray(mask, dtype=bool), ends)


def shared_row(prompt: Sequence[int], replies: Sequence[Sequence[int]], numbers: Sequence[int]) -> Row:
    """A row of a prompt, of at least one token, and replies to it; `numbers` are those of the sequences."""
    *shared, last = prompt
    stretches = [(shared, range(len(shared)), PROMPT, [False] * len(shared), [0] * len(shared))]
    for part, (reply, number) in enumerate(zip(replies, numbers, strict=True), start=PROMPT + 1):
        positions = range(len(shared), len(shared) + 1 + len(reply))
        stretches.append(([last, *reply], positions, part, [False, *[True] * len(reply)], [*[0] * len(reply), number]))
    return Laid(
        np.concatenate([np.asarray(ids, dtype=np.int64) for ids, *_ in stretches]),
        np.concatenate([np.asarray(positions, dtype=np.int64) for _, positions, *_ in stretches]),
        np.concatenate([np.full(len(ids), part, dtype=np.int64) for ids, _, part, *_ in stretches]),
        np.concatenate([np.asarray(mask, dtype=bool) for *_, mask, _ in stretches]),
        np.concatenate([np.asarray(ends, dtype=np.int64) for *_, ends in stretches]),
    )


def padded(rows: Sequence[Row], pad_id: int, multiple: int = 1) -> Laid[np.ndarray]:
    """Rows side by side, padded on the right to the longest, or to the next multiple."""
    shape = (len(rows), rounded_up(max(len(row.ids) for row in rows), multiple))
    arrays = Laid(
        np.full(shape, pad_id, dtype=np.int64),
        np.zeros(shape, dtype=np.int64),
        np.zeros(shape, dtype=np.int64),
        np.zeros(shape, dtype=bool),
        np.zeros(shape, dtype=np.int64),
    )
    for place, row in enumerate(rows):
        for array, values in zip(arrays, row, strict=True):
            array[place, : len(row.ids)] = values
        arrays.positions[place, len(row.ids) :] = row.positions[-1]
    return arrays


def rounded_up(length: int, multiple: int) -> int:
    """The lowest multiple that is at least `length`."""
    return -(-length // multiple) * multiple


def end_to_end(rows: Sequence[Row]) -> Laid[np.ndarray]:
    """All in one row."""
    ids, positions, parts, completions, ends = (np.concatenate(arrays)[None] for arrays in zip(*rows, strict=True))
    stretch = np.repeat(np.arange(len(rows)), [len(row.ids) for row in rows])
    return Laid(ids, positions, parts + PARTS * stretch, completions, ends)
