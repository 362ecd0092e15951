"""The reward of a reward model: its score at the end of prompt and response."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stages.lib.compute.batching import MicroBatching
from stages.lib.compute.sequence_scores import all_scores
from stages.lib.rl.episodes import Episode


@dataclass(frozen=True)
class RewardModel:
    """Reads the policy's own token ids, so it must share the policy's tokenizer.

    Args:
        scores: a `SequenceScores` module, or what stands for one.
    """

    scores: Callable
    batching: MicroBatching

    def __call__(self, episodes: Sequence[Episode]) -> list[float | None]:
        """As `Reward` says."""
        prompts, responses = [episode.prompt.ids for episode in episodes], [episode.ids for episode in episodes]
        return [*all_scores(self.scores, prompts, responses, self.batching)]
