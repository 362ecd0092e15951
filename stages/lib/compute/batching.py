"""Which rows an optimizer step sees, and how they are cut into forward passes.

The order is a function of (seed, epoch) and is fixed before rows are shared out among processes, so neither the number
of processes nor the micro-batch size changes what a step sees.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.compute.pass_cost import FEWEST_PASSES, Cut, PairSize, cheapest_cut, packed_cut, row_cost
from stages.lib.compute.processes import Processes
from stages.lib.compute.row_layouts import Laid, Row, end_to_end, padded, rounded_up, sequence_row, shared_row
from stages.lib.models.model_traits import longest_shared
from stages.lib.settings.runtime import PassCost, Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    same order, also where both lie behind one prompt in a row (`row_layouts`). A filler, which a process runs so that
    all processes make as many passes, has no rows and n = 0: its masks are False everywhere.
    """

    rows: list[int]
    input_ids: torch.Tensor  # (b, t)
    attention_mask: torch.Tensor | None  # (b, t), as `model_mask` takes it; None where there is no padding
    position_ids: torch.Tensor  # (b, t), counted from each sequence's own start
    completion_mask: torch.Tensor  # (b, t), True on completion tokens
    end_mask: (
        torch.Tensor
    )  # (b, t), True on the last token of each sequence, or its number, as `SequenceScores` takes it
    completion_lengths: list[int]  # of each of the n sequences
    reading_order: list[int] | None = None  # the n sequences as they come row after row; None: in their own order

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
        order = self.reading_order or range(len(self.completion_lengths))
        lengths = torch.tensor([self.completion_lengths[place] for place in order], device=values.device).long()
        mask = torch.arange(width, device=values.device) < lengths[:, None]
        empty = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
        read = empty.masked_scatter(mask, values[self.completion_mask])
        return read if self.reading_order is None else read[np.argsort(self.reading_order).tolist()]


@dataclass(frozen=True)
class MicroBatching:
    """How the rows of a step become forward passes on each process.

    Every process is given the same rows and works out the same plan, of which it runs its own part. All make the same
    number of passes, as the collectives of ZeRO demand, and the plan balances their tokens.

    Args:
        budget: tokens of one pass on one process, padding included.
        packing: lay sequences end to end in one row instead of padding them to one length.
        cost: by which the rows are cut, within the budget.
        longest_shared: the most tokens that a prompt and its longest reply may have for replies to share one copy of
            the prompt, which they do where that costs less; 0: prompts are never shared.
        multiple: of which the length of a padded row is one.
    """

    budget: MemoryBudget
    packing: bool
    pad_id: int
    processes: Processes
    cost: PassCost = FEWEST_PASSES
    longest_shared: int = 0
    multiple: int = 1

    def masked(self, sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[int]]) -> Iterator[SequenceBatch]:
        """This process's forward passes over whole sequences, of which `masks` marks the completion tokens with 1."""
        lengths = [len(sequence) for sequence in sequences]
        for rows in self._own(self._cut(lengths).groups, lengths):
            yield self._batch(rows, [sequences[row] for row in rows], [masks[row] for row in rows], sequences[0])

    def sequences(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> Iterator[SequenceBatch]:
        """This process's forward passes over (prompt, completion) sequences; equal prompts may share one copy."""
        bundles = self._cheaper_bundles(prompts, completions)
        widths = [shared_width(bundle, prompts, completions) for bundle in bundles]
        for places in self._own(self._cut(widths).groups, widths):
            some = [bundles[place] for place in places]
            rows = [row for bundle in some for row in bundle]
            if len(rows) == len(some):
                yield self._joined(rows, [prompts[row] for row in rows], [completions[row] for row in rows], prompts[0])
            else:
                yield self._bundled(some, prompts, completions)

    def _cheaper_bundles(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """Rows that lie behind one prompt together, where that costs less than each for itself."""
        apart = [[row] for row in range(len(prompts))]
        if not self.longest_shared or not all(prompts):
            return apart
        together = self._bundles(prompts, completions)
        if len(together) == len(apart):
            return apart
        costs = [
            self._cut([shared_width(bundle, prompts, completions) for bundle in bundles]).cost
            for bundles in (together, apart)
        ]
        return together if costs[0] < costs[1] else apart

    def _bundles(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[list[int]]:
        """Each row behind the copy of its prompt that is there already, if that is cheaper than a copy of its own."""
        bundles: list[list[int]] = []
        last: dict[tuple[int, ...], list[int]] = {}  # of each prompt
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            own = len(prompt) + len(completion)
            bundle = last.get(key := tuple(prompt))
            if bundle is not None and own <= self.longest_shared:
                before, after = (shared_width(rows, prompts, completions) for rows in (bundle, [*bundle, row]))
                gain = row_cost(before, self.cost) + row_cost(own, self.cost) - row_cost(after, self.cost)
                if gain > 0 and after <= self.budget.size:
                    bundle.append(row)
                    continue
            bundles.append([row])
            if own <= self.longest_shared:
                last[key] = bundles[-1]
        return bundles

    def _bundled(
        self, bundles: list[list[int]], prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> SequenceBatch:
        rows = [row for bundle in bundles for row in bundle]
        places = {row: number for number, row in enumerate(rows, start=1)}
        laid = [
            shared_row(prompts[bundle[0]], [completions[row] for row in bundle], [places[row] for row in bundle])
            for bundle in bundles
        ]
        tensors = self._tensors(laid)
        lengths = [len(completions[row]) for row in rows]
        return SequenceBatch(
            rows, tensors.ids, tensors.parts, tensors.positions, tensors.completions, tensors.ends > 0, lengths
        )

    def pairs(
        self, prompts: Sequence[Sequence[int]], chosen: Sequence[Sequence[int]], rejected: Sequence[Sequence[int]]
    ) -> Iterator[SequenceBatch]:
        """As `sequences` for pairs: n pairs give 2n sequences, the n chosen ones first, then the n rejected ones."""
        sizes = [PairSize(*map(len, pair)) for pair in zip(prompts, chosen, rejected, strict=True)]
        groups, shared = self._cheaper_plan(sizes)
        tokens = [size.shared if row in shared else size.apart for row, size in enumerate(sizes)]
        for rows in self._own(groups, tokens):
            some, good, bad = ([column[row] for row in rows] for column in (prompts, chosen, rejected))
            if shared.isdisjoint(rows):
                yield self._joined(rows, some * 2, good + bad, prompts[0])
            else:
                yield self._behind_prompts(rows, some, good, bad)

    def _cheaper_plan(self, sizes: list[PairSize]) -> tuple[list[list[int]], set[int]]:
        """Passes over pairs, and which of these share prompts. No pass has pairs of both kinds."""
        apart = self._plan(sizes, [])
        sharing = [row for row, size in enumerate(sizes) if self._gains(size)]
        together = self._plan(sizes, sharing)
        if sharing and together.cost < apart.cost:
            return together.groups, {*sharing}
        return apart.groups, set()

    def _plan(self, sizes: list[PairSize], shared: list[int]) -> Cut:
        apart = sorted({*range(len(sizes))}.difference(shared))
        widths = [sizes[row].apart if self.packing else sizes[row].longer for row in apart]
        groups, cost = [], 0.0
        for rows, cut in (
            (apart, self._cut(widths, rows=1 if self.packing else 2)),
            (shared, self._cut([sizes[row].shared for row in shared])),
        ):
            groups += [[rows[place] for place in group] for group in cut.groups]
            cost += cut.cost
        return Cut(groups, cost)

    def _gains(self, size: PairSize) -> bool:
        """Whether a pair costs less with both replies behind one prompt than apart."""
        if size.longer > self.longest_shared:
            return False
        lengths = [size.longer, size.prompt + min(size.chosen, size.rejected) if self.packing else size.longer]
        return row_cost(size.shared, self.cost) < sum(row_cost(length, self.cost) for length in lengths)

    def _cut(self, widths: Sequence[int], rows: int = 1) -> Cut:
        if self.packing:
            return packed_cut(widths, self.budget.size, self.cost)
        return cheapest_cut([rounded_up(width, self.multiple) for width in widths], self.budget.size, self.cost, rows)

    def _own(self, groups: list[list[int]], tokens: Sequence[int]) -> Iterator[list[int]]:
        """This process's groups. `tokens`: of each row."""
        for rows in balanced_shares(groups, tokens, self.processes.world_size)[self.processes.rank]:
            self.budget.rows = len(rows)
            yield rows

    def _behind_prompts(
        self,
        rows: list[int],
        prompts: list[Sequence[int]],
        chosen: list[Sequence[int]],
        rejected: list[Sequence[int]],
    ) -> SequenceBatch:
        numbers = [(row, row + len(rows)) for row in range(len(rows))]
        pairs = zip(prompts, zip(chosen, rejected, strict=True), numbers, strict=True)
        laid = [shared_row(prompt, replies, [one + 1 for one in places]) for prompt, replies, places in pairs]
        tensors = self._tensors(laid)
        lengths = [len(reply) for reply in chosen + rejected]
        order = [place for pair in numbers for place in pair]
        return SequenceBatch(
            rows, tensors.ids, tensors.parts, tensors.positions, tensors.completions, tensors.ends, lengths, order
        )

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
        pairs = zip(sequences, masks, strict=True)
        laid = [sequence_row(ids, mask, number) for number, (ids, mask) in enumerate(pairs, start=1)]
        tensors = self._tensors(laid or [sequence_row(stand_in, [0] * len(stand_in), 0)])
        is_padded = not self.packing and any(len(row.ids) < tensors.ids.shape[1] for row in laid)
        return SequenceBatch(
            rows,
            tensors.ids,
            tensors.parts > 0 if is_padded else None,
            tensors.positions,
            tensors.completions,
            tensors.ends > 0,
            [sum(mask) for mask in masks],
        )

    def _tensors(self, rows: list[Row]) -> Laid[torch.Tensor]:
        arrays = end_to_end(rows) if self.packing else padded(rows, self.pad_id, self.multiple)
        return Laid(*(torch.from_numpy(array).to(self.processes.device) for array in arrays))


def shared_width(rows: Sequence[int], prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> int:
    """Tokens of a row of a batch in which these rows lie behind one prompt, as `shared_row` lays them."""
    prompt, replies = len(prompts[rows[0]]), sum(len(completions[row]) for row in rows)
    return prompt + replies if len(rows) == 1 else prompt - 1 + len(rows) + replies


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


def micro_batching(
    runtime: Runtime, pad_id: int, processes: Processes, *models: "PreTrainedModel | None"
) -> MicroBatching:
    """The plan-maker that `runtime.yaml` asks for.

    Args:
        models: all that read the batches, where sequences of them may share prompts; None: one that must not.
    """
    cost = pass_cost_of(runtime, processes.device)
    budget, shared = _budget("micro_batch_tokens", runtime), shared_among(runtime, *models)
    return MicroBatching(budget, runtime.packing, pad_id, processes, cost, shared, runtime.pad_to_multiple_of)


def shared_among(runtime: Runtime, *models: "PreTrainedModel | None") -> int:
    """`MicroBatching.longest_shared` of batches that all these models read; None: one that must not share prompts."""
    limits = [0 if model is None else longest_shared(model) for model in models]
    return min(limits, default=0) if runtime.share_prompts else 0


def pass_cost_of(runtime: Runtime, device: torch.device) -> PassCost:
    """By which rows are cut into passes."""
    cost = runtime.pass_cost.gpu if device.type == "cuda" else runtime.pass_cost.cpu
    if runtime.attention == "flash_attention_2":  # it computes nothing for padding, nor between sequences of one row
        cost = cost.model_copy(update={"attention": FEWEST_PASSES.attention})
    return cost


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
