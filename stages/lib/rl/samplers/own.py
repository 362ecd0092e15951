"""Sampling with the policy that is trained, in the stage's own processes, token by token."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from stages.lib.compute.batching import pad_left
from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.compute.processes import Processes
from stages.lib.data.prompts import Prompt
from stages.lib.rl.episodes import Episode
from stages.lib.rl.sampling import invert_distribution, positions_of, uniform_draws

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Draw(NamedTuple):
    """A response to be sampled: a prompt and the random numbers for it."""

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

    def sample(self, prompts: Sequence[Prompt], step: int, samples_per_prompt: int = 1) -> list[Episode]:
        """As `Sampler` says; a response has up to `max_new_tokens` tokens, the first EOS included."""
        draws = [
            Draw(prompt.ids, prompt.row if self.by_row else place, sample)
            for place, prompt in enumerate(prompts)
            for sample in range(samples_per_prompt)
        ]
        with evaluating(self.language_model):
            responses = self.budget.attempt(lambda: self._responses(draws, step))
        return [
            self.episode(prompts[index // samples_per_prompt], ids, index % samples_per_prompt)
            for index, ids in enumerate(responses)
        ]

    def episode(self, prompt: Prompt, ids: list[int], sample: int) -> Episode:
        """The episode of a response that was sampled."""
        ended = ids[-1] == self.eos_id
        return Episode(prompt, ids, self.decode(ids), ended, sample, engine_logps=None, policy_mask=[True] * len(ids))

    @torch.no_grad()
    def _responses(self, draws: Sequence[Draw], step: int) -> list[list[int]]:
        by_length = sorted(range(len(draws)), key=lambda index: (len(draws[index].ids), index))
        responses: dict[int, list[int]] = {}
        width = self.budget.size * self.processes.world_size
        for start in range(0, len(by_length), width):
            together = by_length[start : start + width]
            group = self.processes.share(together)
            sampled = self._batch([draws[index] for index in group or together[:1]], step, asleep=not group)
            for index, tokens in zip(group, sampled.tolist(), strict=False):
                responses[index] = tokens[: tokens.index(self.eos_id) + 1] if self.eos_id in tokens else tokens
            self.after_batch()
        return self.processes.gather_rows(responses)

    def _batch(self, draws: Sequence[Draw], step: int, *, asleep: bool) -> torch.Tensor:
        """Token by token with a key-value cache, until every row of every process has ended.

        Args:
            asleep: this process has no prompts of its own, and only goes along.
        Returns:
            (b, new tokens); pads after EOS.
        """
        from transformers import DynamicCache

        device = self.processes.device
        cache: Any = DynamicCache(config=self.language_model.config)
        numbers = [uniform_draws(self.seed, step, draw.row, self.max_new_tokens, draw.sample) for draw in draws]
        uniform = torch.from_numpy(np.stack(numbers)).to(device)
        ids, mask = pad_left([draw.ids for draw in draws], self.pad_id, device)
        positions = positions_of(mask)
        ended = torch.full((len(draws),), asleep, dtype=torch.bool, device=device)
        tokens = []
        for place in range(self.max_new_tokens):
            logits = self.policy(ids, mask, positions, cache, run="next_logits")
            drawn = invert_distribution(logits, uniform[:, place], self.temperature)
            token = torch.where(ended, self.pad_id, drawn)
            tokens.append(token)
            ended = ended | (token == self.eos_id)
            if not self.processes.any(not bool(ended.all())):
                break
            ids = token[:, None]
            mask = torch.cat([mask, torch.ones_like(ids, dtype=torch.bool)], dim=1)
            positions = positions[:, -1:] + 1
        return torch.stack(tokens, dim=1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, then in the mode that was: gradient checkpointing would drop the key-value cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
