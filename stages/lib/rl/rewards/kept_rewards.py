"""What the rewards of an entry said of responses, kept until their run is done.

Between a rollout and its update no checkpoint is written. A run that is killed there samples the same responses again,
and finds here what was said of them: a reward that is asked again could say something else, or be late this time.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from stages.lib.command.hashing import value_hash
from stages.lib.compute.processes import Processes
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rewards.kept_answers import KeptAnswers
from stages.lib.rl.rewards.scoring import Failure, RewardScore, ScoredEpisodes


class KeptRewards(NamedTuple):
    """Rewards by the responses that they were given to.

    Args:
        answers: of this run; None in a process that writes none.
        code: hash of the code that scores.
    """

    answers: KeptAnswers | None
    code: str
    processes: Processes

    def scored(
        self, episodes: Sequence[Episode], score: Callable[[Sequence[Episode]], ScoredEpisodes]
    ) -> ScoredEpisodes:
        """What `score`, which all processes enter together, gives, or has given to the same episodes before."""
        key = value_hash([self.code, [identity(episode) for episode in episodes]])
        kept = self.processes.broadcast(self.processes.in_main(lambda: self._of_main.find([key]).get(key)))
        if kept is not None:
            return from_json(kept)
        scored = score(episodes)
        self.processes.in_main(lambda: self._of_main.add({key: scored._asdict()}))
        return scored

    @property
    def _of_main(self) -> KeptAnswers:
        assert self.answers is not None, "only the main process keeps rewards"
        return self.answers


def identity(episode: Episode) -> list[Any]:
    """All that a reward may look at."""
    prompt = episode.prompt
    return [prompt.row, prompt.ids, prompt.facts, prompt.source, episode.sample, episode.ids]


def from_json(kept: dict[str, Any]) -> ScoredEpisodes:
    parts = {name: [score_from_json(score) for score in scores] for name, scores in kept["parts"].items()}
    return ScoredEpisodes(kept["totals"], parts)


def score_from_json(score: Any) -> RewardScore:
    """JSON makes a list of a named tuple."""
    return Failure(*score) if isinstance(score, list) else score
