"""Rewards of responses that were scored before a kill are those that were given then, failures among them."""

from collections.abc import Sequence
from pathlib import Path

from stages.lib.compute.processes import Processes
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rewards.kept_answers import KeptAnswers
from stages.lib.rl.rewards.kept_rewards import KeptRewards
from stages.lib.rl.rewards.mixture import Mixture, MixturePart
from stages.lib.rl.rewards.scoring import Failure, RewardScore
from tests.lib.rl.test_rollouts import EPISODES
from tests.tiny_models import CPU


class Moody:
    """Says something else each time that it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, episodes: Sequence[Episode]) -> list[RewardScore]:
        self.asked += 1
        return [0.1 * self.asked, Failure("timeout", "late"), None][: len(episodes)]


def test_the_same_responses_are_scored_once(tmp_path: Path) -> None:
    def mixture(code: str) -> Mixture:
        kept = KeptRewards(KeptAnswers(tmp_path / "rewards.sqlite"), code, Processes(0, 1, CPU))
        parts = {"moody": MixturePart(moody, missing="skip"), "fixed": MixturePart(lambda asked: [1.0] * len(asked))}
        return Mixture(parts, kept)

    moody = Moody()
    first = mixture("code").scored(EPISODES)
    assert first.totals == [1.1, 1.0, 1.0]
    assert mixture("code").scored(EPISODES) == first  # as of a run that is started again
    assert moody.asked == 1
    assert mixture("code").scored(EPISODES[:2]).totals == [1.2, 1.0]
    changed = EPISODES[0]._replace(ids=[*EPISODES[0].ids, 7])
    assert mixture("code").scored([changed, *EPISODES[1:]]).totals == [1.3, 1.0, 1.0]
    others = EPISODES[0]._replace(prompt=EPISODES[0].prompt._replace(facts={"answer": 1}))
    assert mixture("code").scored([others, *EPISODES[1:]]).totals == [1.4, 1.0, 1.0]
    assert mixture("other code").scored(EPISODES).totals == [1.5, 1.0, 1.0]
