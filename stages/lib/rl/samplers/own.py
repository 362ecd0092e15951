"""Sampling with the policy that is trained, in the stage's own processes, token by token."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

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
from stages.lib.rl.sampling import invert_distribution, uniform_draws
from stages.lib.settings.runtime import PassCost

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_ALIVE = 0.875  # of the rows under way: at fewer the others leave, which copies what is kept


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
        decode: from a response's ids to its text.
        budget: sequences that one process samples at a time.
        by_row: random numbers belong to a prompt's row, rather than to its place among the prompts, where one row may
            come twice.
        after_batch: called by all processes together whenever each has sampled so many.
        cost: of passes over prompts.
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

    def sample(self, prompts: Sequence[Prompt], step: int, samples_per_prompt: int = 1) -> list[Episode]:
        """As `Sampler` says; a response has up to `max_new_tokens` tokens, the first EOS included."""
        groups = [
            [
                Draw(place * samples_per_prompt + sample, prompt.ids, prompt.row if self.by_row else place, sample)
                for sample in range(samples_per_prompt)
            ]
            for place, prompt in enumerate(prompts)
        ]
        groups.sort(key=lambda group: len(group[0].ids))
        with evaluating(self.language_model), torch.no_grad():
            responses = self.budget.attempt(lambda: self._responses(groups, step))
        return [
            self.episode(prompts[index // samples_per_prompt], ids, index % samples_per_prompt)
            for index, ids in enumerate(responses)
        ]

    def episode(self, prompt: Prompt, ids: list[int], sample: int) -> Episode:
        """The episode of a response that was sampled."""
        ended = ids[-1] == self.eos_id
        return Episode(prompt, ids, self.decode(ids), ended, sample, engine_logps=None, policy_mask=[True] * len(ids))

    def _responses(self, groups: Sequence[list[Draw]], step: int) -> list[list[int]]:
        """Of the draws of prompts, which are sorted by length, in the order of the draws' places."""
        responses: dict[int, list[int]] = {}
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

    def _decoding(self, pieces: Sequence[list[Draw]], longest: Sequence[int]) -> Decoding:
        device = self.processes.device
        if max(longest) + self.max_new_tokens <= longest_behind_shared_prompts(self.language_model):
            prompts, samples = [piece[0].ids for piece in pieces], [len(piece) for piece in pieces]
            of_prompts = (prompts, samples, longest, self.pad_id, self.cost, device)
            return BehindSharedPrompts(self.policy, self.language_model, *of_prompts)
        every = [draw.ids for piece in pieces for draw in piece]
        return PaddedTogether(self.policy, self.language_model, every, self.pad_id, device)

    def _batch(
        self, pieces: Sequence[list[Draw]], longest: Sequence[int], step: int, *, asleep: bool
    ) -> dict[int, list[int]]:
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
        ended = torch.full((len(draws),), asleep, dtype=torch.bool, device=device)
        for place in range(self.max_new_tokens):
            drawn = invert_distribution(logits, uniform[rows, place], self.temperature)
            drawn = torch.where(ended, self.pad_id, drawn)
            tokens[rows, place] = drawn
            ended = ended | (drawn == self.eos_id)
            alive = len(ended) - int(ended.sum())
            if place + 1 == self.max_new_tokens or not self.processes.any(alive > 0):
                break
            if decoding.may_leave and alive <= MOST_ALIVE * len(rows) and len(rows) > 1:
                kept = torch.nonzero(~ended).squeeze(1) if alive else torch.zeros(1, dtype=torch.long, device=device)
                decoding.keep(kept)
                rows, drawn, ended = rows[kept], drawn[kept], ended[kept]
            logits = decoding.next(drawn)
        return (
            {}
            if asleep
            else {draw.place: self._until_eos(ids) for draw, ids in zip(draws, tokens.tolist(), strict=True)}
        )

    def _until_eos(self, ids: list[int]) -> list[int]:
        return ids[: ids.index(self.eos_id) + 1] if self.eos_id in ids else ids


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
