"""Sampling with the policy that is trained, in the stage's own processes, token by token."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch
from torch import nn

from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.compute.pass_cost import FEWEST_PASSES
from stages.lib.compute.processes import Processes
from stages.lib.data.prompts import Prompt
from stages.lib.models.shared_prompts import longest_behind_shared_prompts
from stages.lib.rl.episodes import Episode
from stages.lib.rl.samplers.decoding import BehindSharedPrompts, Decoding, PaddedTogether
from stages.lib.rl.sampling import invert_distribution, statistics_of, uniform_draws
from stages.lib.settings.runtime import PassCost

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_ALIVE = 0.875  # of the rows under way: at fewer the others leave, which copies what is kept


class SampledIds(NamedTuple):
    """A response, and what was kept of its tokens' distributions."""

    ids: list[int]
    logps: list[float] | None = None
    entropies: list[float] | None = None


class Draw(NamedTuple):
    """A response to be sampled: its place in the result, its prompt, and what its random numbers belong to."""

    place: int
    ids: list[int]
    row: int
    sample: int


@dataclass(frozen=True)
class OwnSampler:
    """Samples from softmax(logits / temperature) by inverting its cumulative distribution.

    A response depends on the weights, its prompt and its own random numbers, never on the batch it is in. The processes
    share the prompts out and take each forward pass together, as ZeRO 3 demands: a process whose prompts are all
    answered goes along on padding.

    Args:
        policy: a `TokenLogProbs` module or an engine around one.
        language_model: what that module holds.
        temperature: 0 takes the likeliest token.
        max_new_tokens: of a response, the first EOS or what completes a stop string included.
        decode: from a response's ids to its text.
        budget: sequences that one process samples at a time.
        by_row: random numbers belong to a prompt's row, rather than to its place among the prompts, where one row may
            come twice.
        after_batch: called by all processes together whenever each has sampled so many.
        cost: of passes over prompts.
        min_new_tokens: before which neither EOS nor a stop string ends a response.
        top_k, top_p: as `likeliest` takes them.
        stop_strings: a response ends with the token that completes one of them, which stays in its text.
        keeps_logps: episodes have the log-probs of their tokens, and the entropies, of the whole distribution at the
            temperature, from which no token is left out.
        keeps_entropies: False: of these the log-probs alone.
    """

    policy: Callable
    language_model: "PreTrainedModel"
    seed: int
    temperature: float
    max_new_tokens: int
    eos_id: int
    pad_id: int
    decode: Callable[[list[int]], str]
    budget: MemoryBudget
    processes: Processes
    by_row: bool = False
    after_batch: Callable[[], None] = lambda: None
    cost: PassCost = FEWEST_PASSES
    min_new_tokens: int = 0
    top_k: int | None = None
    top_p: float = 1.0
    stop_strings: tuple[str, ...] = ()
    keeps_logps: bool = False
    keeps_entropies: bool = True

    def sample(self, prompts: Sequence[Prompt], step: int, samples_per_prompt: int = 1) -> list[Episode]:
        """As `Sampler` says."""
        groups = [
            [
                Draw(place * samples_per_prompt + sample, prompt.ids, prompt.row if self.by_row else place, sample)
                for sample in range(samples_per_prompt)
            ]
            for place, prompt in enumerate(prompts)
        ]
        groups.sort(key=lambda group: len(group[0].ids))
        with evaluating(self.language_model), torch.no_grad():
            found = self.budget.attempt(lambda: self._responses(groups, step))
        return [
            self.episode(prompts[index // samples_per_prompt], sampled.ids, index % samples_per_prompt)._replace(
                engine_logps=sampled.logps, engine_entropies=sampled.entropies if self.keeps_entropies else None
            )
            for index, sampled in enumerate(found)
        ]

    def take_weights(self) -> None:
        """Nothing is to be done: the policy itself samples."""

    def undisturbed(self) -> Self:
        """As `Sampler` says: a stop in an evaluation would save weights after a phase's updates as those before."""
        return replace(self, by_row=True, after_batch=lambda: None)

    def episode(self, prompt: Prompt, ids: list[int], sample: int) -> Episode:
        """The episode of a response that was sampled, without what was kept of its tokens' distributions."""
        ended = ids[-1] == self.eos_id or self._is_stopped(ids)
        return Episode(prompt, ids, self.decode(ids), ended, sample, engine_logps=None, policy_mask=[True] * len(ids))

    def _is_stopped(self, ids: list[int]) -> bool:
        """Whether the last token completes a stop string."""
        if not self.stop_strings or len(ids) < self.min_new_tokens:
            return False
        # A token is a byte at least, unless it is one of a multi-byte character that only the next ones complete.
        tail = ids[-2 * max(len(text.encode()) for text in self.stop_strings) - 8 :]
        text = self.decode(tail)
        found = [stop for stop in self.stop_strings if stop in text]
        return bool(found) and any(self.decode(tail[:-1]).count(stop) < text.count(stop) for stop in found)

    def _responses(self, groups: Sequence[list[Draw]], step: int) -> list[SampledIds]:
        """Of the draws of prompts, which are sorted by length, in the order of the draws' places."""
        responses: dict[int, SampledIds] = {}
        pieces = [piece for group in groups for piece in cut(group, self.budget.size)]
        width = max(1, self.budget.size // len(pieces[0])) * self.processes.world_size
        for start in range(0, len(pieces), width):
            together = pieces[start : start + width]
            own = self.processes.share(together)
            longest = [
                len(together[min(place + self.processes.world_size, len(together)) - 1][0].ids)
                for place in range(0, len(together), self.processes.world_size)
            ]
            responses |= self._batch(own or together[:1], longest, step, asleep=not own)
            self.after_batch()
        return self.processes.gather_rows(responses)

    @cached_property
    def _longest(self) -> int:
        """How many tokens a prompt with its response may have where prompts are shared."""
        return longest_behind_shared_prompts(self.language_model)

    def _decoding(self, pieces: Sequence[list[Draw]], longest: Sequence[int]) -> Decoding:
        device = self.processes.device
        if max(longest) + self.max_new_tokens <= self._longest:
            prompts, samples = [piece[0].ids for piece in pieces], [len(piece) for piece in pieces]
            of_prompts = (prompts, samples, longest, self.pad_id, self.cost, device)
            return BehindSharedPrompts(self.policy, self.language_model, *of_prompts)
        every = [draw.ids for piece in pieces for draw in piece]
        return PaddedTogether(self.policy, self.language_model, every, self.pad_id, device)

    def _batch(
        self, pieces: Sequence[list[Draw]], longest: Sequence[int], step: int, *, asleep: bool
    ) -> dict[int, SampledIds]:
        """Token by token, until every row of every process has ended.

        Args:
            pieces: of this process, each the draws of one prompt.
            longest: prompts at the places of `pieces`, over all processes.
            asleep: this process has no prompts of its own, and only goes along.
        Returns:
            The responses by the places of their draws; none if asleep.
        """
        device = self.processes.device
        draws = [draw for piece in pieces for draw in piece]
        numbers = [uniform_draws(self.seed, step, draw.row, self.max_new_tokens, draw.sample) for draw in draws]
        uniform = torch.from_numpy(np.stack(numbers)).to(device)
        decoding = self._decoding(pieces, longest)
        rows, logits = torch.arange(len(draws), device=device), decoding.first  # the rows under way
        tokens = torch.full((len(draws), self.max_new_tokens), self.pad_id, device=device)
        lengths = torch.full((len(draws),), self.max_new_tokens, device=device)
        kept = torch.zeros((2, *tokens.shape), device=device) if self.keeps_logps else None
        ended = torch.full((len(draws),), asleep, dtype=torch.bool, device=device)
        for place in range(self.max_new_tokens):
            drawn = self._drawn(logits, uniform[rows, place], place)
            drawn = torch.where(ended, self.pad_id, drawn)
            tokens[rows, place] = drawn
            if kept is not None:
                kept[:, rows, place] = statistics_of(logits, drawn, self.temperature)
            ending = ~ended & self._ends(drawn, tokens, rows, ended, place)
            lengths[rows[ending]] = place + 1
            ended = ended | ending
            alive = len(ended) - int(ended.sum())
            if place + 1 == self.max_new_tokens or not self.processes.any(alive > 0):
                break
            if decoding.may_leave and alive <= MOST_ALIVE * len(rows) and len(rows) > 1:
                left = torch.nonzero(~ended).squeeze(1) if alive else torch.zeros(1, dtype=torch.long, device=device)
                decoding.keep(left)
                rows, drawn, ended = rows[left], drawn[left], ended[left]
            logits = decoding.next(drawn)
        if asleep:
            return {}
        columns = [tokens.tolist(), *(kept.tolist() if kept is not None else [])]
        ends = lengths.tolist()
        return {
            draw.place: SampledIds(*(column[row][: ends[row]] for column in columns)) for row, draw in enumerate(draws)
        }

    def _drawn(self, logits: torch.Tensor, uniform: torch.Tensor, place: int) -> torch.Tensor:
        """The token number `place` of each row, 0-based, (n, vocabulary), (n,) → (n,)."""
        if place + 1 < self.min_new_tokens:
            logits = logits.index_fill(1, torch.tensor([self.eos_id], device=logits.device), -torch.inf)
        return invert_distribution(logits, uniform, self.temperature, self.top_k, self.top_p)

    def _ends(
        self, drawn: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, ended: torch.Tensor, place: int
    ) -> torch.Tensor:
        """Whether the token number `place` ends each of the rows under way that have not ended, (n,)."""
        ends = drawn == self.eos_id
        if not self.stop_strings or place + 1 < self.min_new_tokens:
            return ends
        open_rows = torch.nonzero(~(ends | ended)).squeeze(1)
        texts = tokens[rows[open_rows], : place + 1].tolist()
        stopped = torch.tensor([self._is_stopped(ids) for ids in texts], dtype=torch.bool, device=ends.device)
        return ends.index_copy(0, open_rows, stopped)


def cut(draws: Sequence[Draw], size: int) -> Iterator[list[Draw]]:
    """At most `size` at a time, in pieces about as long."""
    pieces = math.ceil(len(draws) / size)
    for piece in range(pieces):
        yield list(draws[piece * len(draws) // pieces : (piece + 1) * len(draws) // pieces])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, then in the mode that was: gradient checkpointing would drop the key-value cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
