"""Which rows an optimizer step sees, and how they are cut into forward passes.

The order is a function of (seed, epoch) and is fixed before rows are shared out among processes, so neither the number
of processes nor the micro-batch size changes what a step sees.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.compute.processes import Processes
from stages.lib.settings.runtime import Runtime


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


def pad_left(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad id sequences on the left, for generation.

    Returns:
        ids (b, t) and attention mask (b, t), True on real tokens, from lengths.
    """
    width = max(len(sequence) for sequence in sequences)
    ids = np.full((len(sequences), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(sequences), width), dtype=bool)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = sequence
        mask[row, width - len(sequence) :] = True
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


class SequenceBatch(NamedTuple):
    """One forward pass over n sequences, one a row and padded on the right, or all in one row (packed).

    `rows` are indices into what was cut up; pairs have their chosen completions first, then the rejected ones in the
    same order. A filler, which a process runs so that all processes make as many passes, has no rows and n = 0: its
    masks are False everywhere.
    """

    rows: list[int]
    input_ids: torch.Tensor  # (b, t)
    attention_mask: torch.Tensor | None  # (b, t), True on real tokens; None where there is no padding
    position_ids: torch.Tensor  # (b, t), counted from each sequence's own start
    completion_mask: torch.Tensor  # (b, t), True on completion tokens
    end_mask: torch.Tensor  # (b, t), True on the last token of each sequence
    completion_lengths: list[int]  # of each of the n sequences

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """What every module takes first: ids, attention mask, position ids."""
        return self.input_ids, self.attention_mask, self.position_ids

    def on_completions(self, values: torch.Tensor, width: int | None = None) -> torch.Tensor:
        """Per-token values (b, t) as (n, width): a row for each sequence's completion tokens, 0 beyond its end.

        Args:
            width: at least the longest completion, which is the default.
        """
        width = max(self.completion_lengths, default=0) if width is None else width
        lengths = torch.tensor(self.completion_lengths, dtype=torch.long, device=values.device)
        mask = torch.arange(width, device=values.device) < lengths[:, None]
        empty = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
        return empty.masked_scatter(mask, values[self.completion_mask])


@dataclass(frozen=True)
class MicroBatching:
    """How the rows of a step become forward passes on each process.

    Every process is given the same rows and works out the same plan, of which it runs its own part. All make the same
    number of passes, as the collectives of ZeRO demand, and the plan balances their tokens.

    Args:
        budget: tokens of one pass on one process, padding included.
        packing: lay sequences end to end in one row instead of padding them to one length.
    """

    budget: MemoryBudget
    packing: bool
    pad_id: int
    processes: Processes

    def masked(self, sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[int]]) -> Iterator[SequenceBatch]:
        """This process's forward passes over whole sequences, of which `masks` marks the completion tokens with 1."""
        for rows in self._own_groups([len(sequence) for sequence in sequences]):
            yield self._batch(rows, [sequences[row] for row in rows], [masks[row] for row in rows], sequences[0])

    def sequences(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> Iterator[SequenceBatch]:
        """This process's forward passes over (prompt, completion) sequences."""
        lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
        for rows in self._own_groups(lengths):
            yield self._joined(rows, [prompts[row] for row in rows], [completions[row] for row in rows], prompts[0])

    def pairs(
        self, prompts: Sequence[Sequence[int]], chosen: Sequence[Sequence[int]], rejected: Sequence[Sequence[int]]
    ) -> Iterator[SequenceBatch]:
        """As `sequences` for pairs: n pairs give 2n sequences, the n chosen ones first, then the n rejected ones."""
        triples = zip(prompts, chosen, rejected, strict=True)
        if self.packing:
            lengths = [2 * len(prompt) + len(good) + len(bad) for prompt, good, bad in triples]
        else:
            lengths = [2 * (len(prompt) + max(len(good), len(bad))) for prompt, good, bad in triples]
        for rows in self._own_groups(lengths):
            completions = [chosen[row] for row in rows] + [rejected[row] for row in rows]
            yield self._joined(rows, [prompts[row] for row in rows] * 2, completions, prompts[0])

    def _own_groups(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        groups = (packed_groups if self.packing else micro_batches)(lengths, self.budget.size)
        for rows in balanced_shares(groups, lengths, self.processes.world_size)[self.processes.rank]:
            self.budget.rows = len(rows)
            yield rows

    def _joined(
        self,
        rows: list[int],
        prompts: list[Sequence[int]],
        completions: list[Sequence[int]],
        stand_in: Sequence[int],
    ) -> SequenceBatch:
        both = list(zip(prompts, completions, strict=True))
        sequences = [[*prompt, *completion] for prompt, completion in both]
        masks = [[0] * len(prompt) + [1] * len(completion) for prompt, completion in both]
        return self._batch(rows, sequences, masks, stand_in)

    def _batch(
        self,
        rows: list[int],
        sequences: Sequence[Sequence[int]],
        masks: Sequence[Sequence[int]],
        stand_in: Sequence[int],
    ) -> SequenceBatch:
        lay_out = _packed if self.packing else _padded
        arrays = lay_out(sequences or [stand_in], masks or [[0] * len(stand_in)], self.pad_id)
        tensors = [torch.from_numpy(array).to(self.processes.device) for array in arrays]
        input_ids, attention_mask, position_ids, completion_mask, end_mask = tensors
        return SequenceBatch(
            rows,
            input_ids,
            None if arrays[1].all() else attention_mask,
            position_ids,
            completion_mask,
            end_mask if rows else torch.zeros_like(end_mask),
            [sum(mask) for mask in masks],
        )


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _padded(sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[int]], pad_id: int) -> Arrays:
    """(ids, attention mask, positions, completion mask, end mask), each (n, longest)."""
    shape = (len(sequences), max(len(sequence) for sequence in sequences))
    ids, positions = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    attention, completion, end = (np.zeros(shape, dtype=bool) for _ in range(3))
    for row, (sequence, mask) in enumerate(zip(sequences, masks, strict=True)):
        length = len(sequence)
        ids[row, :length] = sequence
        attention[row, :length] = True
        positions[row] = np.minimum(np.arange(shape[1]), length - 1)
        completion[row, :length] = mask
        end[row, length - 1] = True
    return ids, attention, positions, completion, end


def _packed(sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[int]], _pad_id: int) -> Arrays:
    """As `_padded`, all in one row: each (1, sum of lengths)."""
    lengths = [len(sequence) for sequence in sequences]
    ids = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in sequences])
    positions = np.concatenate([np.arange(length) for length in lengths])
    completion = np.concatenate([np.asarray(mask, dtype=bool) for mask in masks])
    end = np.zeros(len(ids), dtype=bool)
    end[np.cumsum(lengths) - 1] = True
    return ids[None], np.ones((1, len(ids)), dtype=bool), positions[None], completion[None], end[None]


def packed_groups(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Cut items into groups of at most `token_budget` tokens (or one item): best fit, longest first.

    Returns:
        Indices into `lengths`, every index once; groups in the order in which they were opened.
    """
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(room, (lengths[index], 0))
        if place < len(room):
            left, group = room.pop(place)
            groups[group].append(index)
        else:
            left, group = token_budget, len(groups)
            groups.append([index])
        insort(room, (left - lengths[index], group))
    return groups


def balanced_shares(groups: list[list[int]], lengths: Sequence[int], world_size: int) -> list[list[list[int]]]:
    """Deal groups out to processes, as many to each, with about as many tokens.

    The largest groups are halved until their number is a multiple of `world_size`; where too few rows are left for
    that, empty groups fill up. Then the largest first, each goes to the process with the fewest tokens that has room.

    Returns:
        For each process its groups; every row of `groups` once.
    """

    def tokens(group: list[int]) -> int:
        return sum(lengths[row] for row in group)

    groups = [list(group) for group in groups]
    while len(groups) % world_size:
        largest = max(range(len(groups)), key=lambda place: (len(groups[place]) > 1, tokens(groups[place]), -place))
        group = groups[largest]
        middle = len(group) // 2
        groups[largest : largest + 1] = [group[:middle], group[middle:]] if middle else [group, []]
    if world_size == 1:
        return [groups]
    shares: list[list[list[int]]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for group in sorted(groups, key=lambda group: -tokens(group)):
        open_shares = [rank for rank in range(world_size) if len(shares[rank]) < len(groups) // world_size]
        rank = min(open_shares, key=lambda rank: (loads[rank], rank))
        shares[rank].append(group)
        loads[rank] += tokens(group)
    return shares


def micro_batching(runtime: Runtime, pad_id: int, processes: Processes) -> MicroBatching:
    """The plan-maker that `runtime.yaml` asks for."""
    return MicroBatching(_budget("micro_batch_tokens", runtime), runtime.packing, pad_id, processes)


def sampling_budget(runtime: Runtime) -> MemoryBudget:
    """How many sequences one process samples at a time."""
    return _budget("generation_batch_size", runtime)


def _budget(key: str, runtime: Runtime) -> MemoryBudget:
    return MemoryBudget(key, getattr(runtime, key), may_halve=runtime.on_out_of_memory == "retry")


def is_due(step: int, every: int, total: int) -> bool:
    """True after step `step` (1-based) if it is a multiple of `every`, or the last."""
    return step % every == 0 or step == total


def tokens_in_pairs(pairs: Mapping[str, list]) -> int:
    """Tokens that a model reads of these pairs: the prompt counts twice."""
    columns = ("prompt_ids", "prompt_ids", "chosen_ids", "rejected_ids")
    return sum(len(ids) for name in columns for ids in pairs[name])
