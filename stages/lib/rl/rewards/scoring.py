"""What scores responses."""

from collections.abc import Sequence
from typing import Protocol

from stages.lib.command.errors import StageError
from stages.lib.rl.episodes import Episode


class Reward(Protocol):
    """Scores all responses of a phase at once, so that a model can batch them, and a rule can ignore that."""

    def __call__(self, episodes: Sequence[Episode]) -> list[float | None]:
        """A number for each episode, the higher the better, None where it has no say; the same in all processes."""
        ...


def scores_of(reward: Reward, episodes: Sequence[Episode]) -> list[float]:
    """The score of each episode. Raises StageError if one has none: there is nothing to learn from it."""
    scores = reward(episodes)
    for episode, score in zip(episodes, scores, strict=True):
        if score is None:
            raise StageError(
                f"row {episode.prompt.row} of the prompts: the reward gives no score to the response "
                f"{episode.text[:60]!r}"
            )
    return [score for score in scores if score is not None]
