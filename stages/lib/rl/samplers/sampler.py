"""What draws a policy's responses."""

from collections.abc import Sequence
from typing import Protocol

from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.data.prompts import Prompt
from stages.lib.rl.episodes import Episode


class Sampler(Protocol):
    """Answers prompts with the policy as it is now."""

    @property
    def temperature(self) -> float:
        """Of sampling, and so of every log-prob of what was sampled."""
        ...

    @property
    def budget(self) -> MemoryBudget:
        """How many sequences one process samples at a time; part of a checkpoint."""
        ...

    def sample(self, prompts: Sequence[Prompt], step: int, samples_per_prompt: int) -> list[Episode]:
        """The same list in all processes: all samples of the first prompt, then all of the second one, and so on.

        Args:
            prompts: the same in all processes.
            step: of training, from which, with the seed, random numbers are drawn.
            samples_per_prompt: different samples of a prompt have random numbers of their own.
        """
        ...
