"""What scores responses."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from stages.lib.command.errors import StageError
from stages.lib.rl.episodes import Episode


class RewardError(StageError):
    """A response has no reward, in all processes alike."""


class Failure(NamedTuple):
    """Why a reward that was asked gave no number."""

    kind: Literal["error", "timeout", "row"]  # row: a fault of the prompt's row, which always stops the run
    reason: str  # one line


RewardScore = float | Failure | None  # None: the reward does not apply


class Reward(Protocol):
    """Scores all responses of a phase at once, so that a model can batch them, and a rule can ignore that."""

    def __call__(self, episodes: Sequence[Episode]) -> Sequence[RewardScore]:
        """A number for each episode, the higher the better, None where it has no say; the same in all processes."""
        ...


class ScoredEpisodes(NamedTuple):
    """The reward of each episode, and what each part of it said, by name."""

    totals: list[float]
    parts: dict[str, list[RewardScore]] = {}  # noqa: RUF012 (never changed)


def scores_of(reward: Reward, episodes: Sequence[Episode]) -> list[float]:
    """The score of each episode. Raises RewardError if one has none: there is nothing to learn from it."""
    scores = []
    for episode, score in zip(episodes, reward(episodes), strict=True):
        if score is None or isinstance(score, Failure):
            why = "" if score is None else f": {score.reason}"
            raise RewardError(f"{told_episode(episode)}: the reward gives no score to it{why}")
        scores.append(score)
    return scores


def told_episode(episode: Episode) -> str:
    """Which response a message is about."""
    sample = f", sample {episode.sample + 1}" if episode.sample else ""
    return f"row {episode.prompt.row} of the prompts{sample}, response {episode.text[:60]!r}"
