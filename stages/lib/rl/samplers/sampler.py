"""What draws a policy's responses."""

from collections.abc import Sequence
from typing import Protocol

from stages.lib.command.errors import StageError
from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.data.prompts import Prompt
from stages.lib.rl.episodes import Episode


class SamplerError(StageError):
    """An engine that samples has failed, in all processes alike."""


class Sampler(Protocol):
    """Answers prompts with a policy, as it is or as it was when its weights were taken."""

    @property
    def temperature(self) -> float:
        """Of sampling, and so of every log-prob of what was sampled."""
        ...

    @property
    def budget(self) -> MemoryBudget:
        """How many sequences one process samples at a time; part of a checkpoint."""
        ...

    def take_weights(self) -> None:
        """Sample with the policy as it is now, from here on. All processes call this together.

        Raises:
            SamplerError: the sampler does not have them, or cannot be shown to.
        """
        ...

    def undisturbed(self) -> "Sampler":
        """The same for a held-out evaluation: no stop in its midst, and, where random numbers can, they belong to a
        prompt's row."""
        ...

    def sample(self, prompts: Sequence[Prompt], step: int, samples_per_prompt: int) -> list[Episode]:
        """The same list in all processes: all samples of the first prompt, then all of the second one, and so on.

        Args:
            prompts: the same in all processes.
            step: of training, from which, with the seed, random numbers are drawn.
            samples_per_prompt: different samples of a prompt have random numbers of their own.
        Raises:
            SamplerError: an engine outside of this program gives no answer; what it gave before is kept.
        """
        ...
