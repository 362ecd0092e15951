"""The reward of a reward model: its score at the end of prompt and response."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from stages.lib.compute.batching import MicroBatching
from stages.lib.rl.episodes import Episode


@dataclass(frozen=True)
class RewardModel:
    """Reads the policy's own token ids, so it must share the policy's tokenizer.

    Args:
        scores: a `SequenceScores` module, or what stands for one.
    """

    scores: Callable
    batching: MicroBatching

    @torch.no_grad()
    def __call__(self, episodes: Sequence[Episode]) -> list[float | None]:
        """As `Reward` says."""
        prompts, responses = [episode.prompt.ids for episode in episodes], [episode.ids for episode in episodes]

        def passes() -> dict[int, float | None]:
            found: dict[int, float | None] = {}
            for batch in self.batching.sequences(prompts, responses):
                scores = self.scores(*batch.inputs, batch.end_mask).tolist()
                found |= dict(zip(batch.rows, scores, strict=True))
            return found

        return self.batching.processes.gather_rows(self.batching.budget.attempt(passes))
