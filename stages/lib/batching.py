"""Which rows an optimizer step sees, and how they are cut into forward passes.

The order is a function of (seed, epoch) and is fixed before rows are shared out among processes, so neither the number
of processes nor the micro-batch size changes what a step sees.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch


@lru_cache(maxsize=2)  # a step asks for one or two epochs, the next one for the same
def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(rows) drawn from (seed, epoch). Shape: (rows,)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)


def steps_in(rows: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps in `epochs` passes over `rows`; the last step may be smaller than the others."""
    return max(1, math.ceil(math.floor(epochs * rows) / batch_size))


def rows_of_step(step: int, rows: int, batch_size: int, epochs: float, seed: int) -> list[int]:
    """The rows of optimizer step `step` (0-based): a batch that may span two epochs, so no row is ever left out."""
    last = max(1, math.floor(epochs * rows))
    positions = range(step * batch_size, min((step + 1) * batch_size, last))
    orders = {epoch: epoch_order(rows, seed, epoch) for epoch in {position // rows for position in positions}}
    return [int(orders[position // rows][position % rows]) for position in positions]


def micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Cut items into groups of at most `token_budget` padded tokens (or one item), longest first to pad little.

    Args:
        lengths: tokens of each item.
    Returns:
        Indices into `lengths`, every index once.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def pad_right(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad id sequences on the right. Returns (ids (b, t), attention mask (b, t), True on real tokens, from lengths)."""
    return _pad(sequences, pad_id, device, left=False)


def pad_left(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad id sequences on the left, for generation. Returns as `pad_right`."""
    return _pad(sequences, pad_id, device, left=True)


def _pad(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(sequence) for sequence in sequences)
    ids = np.full((len(sequences), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(sequences), width), dtype=bool)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, place] = sequence
        mask[row, place] = True
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def completion_mask(
    prompt_lengths: Sequence[int], total_lengths: Sequence[int], width: int, device: torch.device
) -> torch.Tensor:
    """True on completion tokens of right-padded rows, from lengths alone. Shape: (b, width)."""
    positions = torch.arange(width, device=device)
    starts = torch.tensor(prompt_lengths, device=device)[:, None]
    ends = torch.tensor(total_lengths, device=device)[:, None]
    return (positions >= starts) & (positions < ends)


class SequenceBatch(NamedTuple):
    """One forward pass. `rows` are indices into what was cut up; tensors hold their sequences in that order."""

    rows: list[int]
    input_ids: torch.Tensor  # (b, t), padded on the right
    attention_mask: torch.Tensor  # (b, t), True on real tokens
    completion_mask: torch.Tensor  # (b, t), True on completion tokens


def sequence_batches(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    token_budget: int,
    pad_id: int,
    device: torch.device,
) -> Iterator[SequenceBatch]:
    """Cut (prompt, completion) sequences into padded forward passes of at most `token_budget` tokens."""
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    for rows in micro_batches(lengths, token_budget):
        yield _batch(rows, [prompts[row] for row in rows], [completions[row] for row in rows], pad_id, device)


def pair_batches(
    prompts: Sequence[Sequence[int]],
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
    token_budget: int,
    pad_id: int,
    device: torch.device,
) -> Iterator[SequenceBatch]:
    """As `sequence_batches` for pairs: n rows give 2n sequences, the n chosen ones first, then the n rejected ones."""
    lengths = [
        2 * (len(prompt) + max(len(good), len(bad)))
        for prompt, good, bad in zip(prompts, chosen, rejected, strict=True)
    ]
    for rows in micro_batches(lengths, token_budget):
        completions = [chosen[row] for row in rows] + [rejected[row] for row in rows]
        yield _batch(rows, [prompts[row] for row in rows] * 2, completions, pad_id, device)


def _batch(
    rows: list[int],
    prompts: list[Sequence[int]],
    completions: list[Sequence[int]],
    pad_id: int,
    device: torch.device,
) -> SequenceBatch:
    sequences = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    input_ids, attention_mask = pad_right(sequences, pad_id, device)
    completion = completion_mask(
        [len(prompt) for prompt in prompts], [len(sequence) for sequence in sequences], input_ids.shape[1], device
    )
    return SequenceBatch(rows, input_ids, attention_mask, completion)


def is_due(step: int, every: int, total: int) -> bool:
    """True after step `step` (1-based) if it is a multiple of `every`, or the last."""
    return step % every == 0 or step == total
