"""The weighted sum of several rewards, each with a name: what a reward model and others say together."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from stages.lib.command.json_schema import LARGEST_NUMBER
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rewards.kept_rewards import KeptRewards
from stages.lib.rl.rewards.scoring import Failure, Reward, RewardError, RewardScore, ScoredEpisodes, told_episode
from stages.lib.settings.reward_part import RowsWhere


class JudgedReward(Protocol):
    """A reward that reads the scores of another one, by whose name it is asked."""

    judged_by: str

    def __call__(self, episodes: Sequence[Episode], scores: Sequence[RewardScore]) -> Sequence[RewardScore]: ...


class MixturePart(NamedTuple):
    """One of the rewards of a mixture."""

    reward: Reward | JudgedReward
    weight: float = 1.0
    where: RowsWhere | None = None
    missing: Literal["stop", "skip"] = "stop"

    def applies_to(self, episode: Episode) -> bool:
        """Whether the row of an episode's prompt is one that this reward is for."""
        return self.where is None or fact_of(episode, self.where.fact) == typed(self.where.value)


class Mixture(NamedTuple):
    """A `Reward`: the sum of those that apply, each times its weight.

    Args:
        by_name: the parts; one that reads another's scores may stand before it.
        kept: what was said before of the same episodes, which then counts.
    """

    by_name: Mapping[str, MixturePart]
    kept: KeptRewards | None = None

    def __call__(self, episodes: Sequence[Episode]) -> list[float]:
        return self.scored(episodes).totals

    def scored(self, episodes: Sequence[Episode]) -> ScoredEpisodes:
        """The sums, and what each part said.

        Raises:
            RewardError: a part fails where it must not, or none applies to an episode.
        """
        return self._scored(episodes) if self.kept is None else self.kept.scored(episodes, self._scored)

    def _scored(self, episodes: Sequence[Episode]) -> ScoredEpisodes:
        parts = self.said(episodes)
        return ScoredEpisodes([self._total(row, episodes, parts) for row in range(len(episodes))], parts)

    def said(self, episodes: Sequence[Episode]) -> dict[str, list[RewardScore]]:
        """What each part says of the episodes, by name. Raises RewardError if one fails where it must not."""
        parts: dict[str, list[RewardScore]] = {}
        for name in self._in_order():
            parts[name] = self._scores_of_part(name, episodes, parts)
        return {name: parts[name] for name in self.by_name}

    def _in_order(self) -> Iterator[str]:
        judged = [name for name, part in self.by_name.items() if hasattr(part.reward, "judged_by")]
        yield from (name for name in self.by_name if name not in judged)
        yield from judged

    def _scores_of_part(
        self, name: str, episodes: Sequence[Episode], before: Mapping[str, list[RewardScore]]
    ) -> list[RewardScore]:
        part = self.by_name[name]
        rows = [row for row, episode in enumerate(episodes) if part.applies_to(episode)]
        asked: list[Any] = [[episodes[row] for row in rows]]
        judge = getattr(part.reward, "judged_by", None)
        if judge is not None:
            asked.append([before[judge][row] for row in rows])
        scores: list[RewardScore] = [None] * len(episodes)
        for row, given in zip(rows, part.reward(*asked) if rows else (), strict=True):
            score = finite_score(given)
            if isinstance(score, Failure) and (part.missing == "stop" or score.kind == "row"):
                raise RewardError(f"{told_episode(episodes[row])}: the reward {name} fails: {score.reason}")
            scores[row] = score
        return scores

    def _total(self, row: int, episodes: Sequence[Episode], parts: Mapping[str, list[RewardScore]]) -> float:
        said = {name: scores[row] for name, scores in parts.items() if scores[row] is not None}
        if not any(self.by_name[name].weight for name in said):
            raise RewardError(
                f"{told_episode(episodes[row])}: no reward applies to it ({', '.join(self.by_name)}); there is nothing "
                "to learn from it"
            )
        return math.fsum(
            self.by_name[name].weight * score for name, score in said.items() if isinstance(score, int | float)
        )


def finite_score(score: RewardScore) -> RewardScore:
    """The same as a float, or a failure for NaN, infinity, and what float32 could not square and add up."""
    if score is None or isinstance(score, Failure):
        return score
    if abs(score) <= LARGEST_NUMBER:
        return float(score)
    return Failure("error", f"it gives {score:g}; expected a number within ±{LARGEST_NUMBER:g}")


def fact_of(episode: Episode, fact: str) -> Any:
    """A fact of the row of an episode's prompt, of any JSON type, as `typed`; "source" is the name of its source."""
    return typed({"source": episode.prompt.source, **episode.prompt.facts}.get(fact))


def typed(value: Any) -> tuple[str, Any]:
    """A value with its type, since Python takes true for 1."""
    return ("bool" if isinstance(value, bool) else "other", value)
