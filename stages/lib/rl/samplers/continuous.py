"""Sampling with transformers' continuous batching: rows leave when they end, and others take their place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.data.prompts import Prompt
from stages.lib.rl.episodes import Episode
from stages.lib.rl.samplers.own import evaluating
from stages.lib.rl.samplers.sampler import SamplerError
from stages.lib.settings.sampling import SamplingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAGE = 64  # tokens of a page of the cache
PASS_TOKENS = 2048  # at most, in one forward pass, or one of each row under way


@dataclass(frozen=True)
class ContinuousSampler:
    """A `Sampler` in one process, with the model that is trained. Random numbers belong to a step and its batches.

    Args:
        decode: from a response's ids to its text.
        budget: rows under way at a time.
    """

    language_model: "PreTrainedModel"
    settings: SamplingSettings
    seed: int
    eos_id: int
    pad_id: int
    decode: Callable[[list[int]], str]
    budget: MemoryBudget

    @property
    def temperature(self) -> float:
        return self.settings.temperature

    def take_weights(self) -> None:
        """Nothing is to be done: the policy itself samples."""

    def undisturbed(self) -> Self:
        """As `Sampler` says; nothing disturbs it."""
        return self

    def sample(self, prompts: Sequence[Prompt], step: int, samples_per_prompt: int = 1) -> list[Episode]:
        """As `Sampler` says."""
        inputs = [prompt.ids for prompt in prompts for _ in range(samples_per_prompt)]
        with evaluating(self.language_model), torch.no_grad():
            found = self.budget.attempt(lambda: self._outputs(inputs, step))
        if len(found) != len(inputs) or any(output.error for output in found):
            errors = [str(output.error) for output in found if output.error]
            raise SamplerError(f"transformers' continuous batching fails: {errors[0] if errors else 'no answer'}")
        return [
            self.episode(prompts[place // samples_per_prompt], output, place % samples_per_prompt)
            for place, output in enumerate(found)
        ]

    def _outputs(self, inputs: list[list[int]], step: int) -> list[Any]:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        settings, rows = self.settings, min(self.budget.size, len(inputs))
        generation = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            do_sample=True,
            temperature=settings.temperature,
            top_k=settings.top_k or 0,
            top_p=settings.top_p,
            eos_token_id=self.eos_id,
            pad_token_id=self.pad_id,
        )
        pages = -(-(max(map(len, inputs)) + settings.max_new_tokens) // PAGE)
        batching = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=rows * pages + 1,
            max_batch_tokens=max(PASS_TOKENS, rows),
            max_requests_per_batch=rows,
            use_async_batching=False,
            auto_switch_to_flash=False,
            return_logprobs=True,
            seed=int(np.random.SeedSequence([self.seed, step]).generate_state(1)[0]),
        )
        model: Any = self.language_model
        return [*model.generate_batch(inputs, generation, batching, warmup=False).values()]

    def episode(self, prompt: Prompt, output: Any, sample: int) -> Episode:
        ids = [int(token) for token in output.generated_tokens]
        logps = [float(logp) for logp in output.logprobs] if self.settings.draws_from_all else None
        ended = ids[-1] == self.eos_id
        return Episode(prompt, ids, self.decode(ids), ended, sample, engine_logps=logps, policy_mask=[True] * len(ids))
