"""Rewards that are arithmetic on tokens: values by hand."""

import pytest

from stages.lib.data.prompts import Prompt
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rewards.length_rewards import CosineLength, Overlong, Repetition
from stages.lib.rl.rewards.mixture import Mixture, MixturePart
from stages.lib.rl.rewards.scoring import Failure
from stages.lib.settings.declaration import block
from stages.lib.settings.rewards import CosineLengthReward, OverlongReward, RepetitionReward


def of_tokens(ids: list[int]) -> Episode:
    return Episode(Prompt(0, [1], [], {}), ids, "", True, 0, None, [True] * len(ids))


def of_length(length: int) -> Episode:
    return of_tokens([*range(length)])


@pytest.mark.parametrize(
    ("length", "score", "reward"),
    [
        (0, 1.0, 2.0),  # the best right answer, and from there on less
        (50, 1.0, 1.5),
        (25, 1.0, 1.8535533905932737),  # 1 + ½ (1 + cos 45°)
        (99, 1.0, 1.0002466),
        (0, 0.0, -10.0),
        (50, 0.0, -5.0),
        (50, 0.5, -5.0),  # half right is not right
        (50, Failure("timeout", "late"), -5.0),
        (100, 1.0, -10.0),
        (130, 0.0, -10.0),
        (7, None, None),
    ],
)
def test_cosine(length: int, score: float | None, reward: float | None) -> None:
    cosine = CosineLength(CosineLengthReward(**block(CosineLengthReward)), 100)
    (found,) = cosine([of_length(length)], [score])
    assert found == (None if reward is None else pytest.approx(reward, abs=1e-6))


def test_what_it_is_judged_by_may_stand_behind_it() -> None:
    settings = CosineLengthReward(**block(CosineLengthReward, longest=4))
    mixture = Mixture(
        {"length": MixturePart(CosineLength(settings, 100)), "answer": MixturePart(lambda _: [1.0, 0.0], weight=0.0)}
    )
    found = mixture.scored([of_length(2), of_length(2)])
    assert [*found.parts] == ["length", "answer"]
    assert found.totals == pytest.approx([1.5, -5.0])


@pytest.mark.parametrize(
    ("ids", "n", "share"),
    [([5, 5, 5, 5], 1, 0.75), ([5, 5, 5, 5], 2, 2 / 3), ([1, 2, 1, 2, 1], 2, 0.5), ([1, 2], 3, 0), ([], 1, 0)],
)
def test_repetition(ids: list[int], n: int, share: float) -> None:
    reward = Repetition(RepetitionReward(**block(RepetitionReward, n=n, penalty=3.0)))
    assert reward([of_tokens(ids)]) == pytest.approx([-3 * share])


def test_overlong() -> None:
    reward = Overlong(OverlongReward(**block(OverlongReward, buffer=4, penalty=2.0)), 10)
    assert reward([of_length(length) for length in (1, 6, 7, 9, 10, 12)]) == [0, 0, -0.5, -1.5, -2, -2]
    other = Overlong(OverlongReward(**block(OverlongReward, buffer=4, longest=8)), 10)
    assert other([of_length(6)]) == [-0.5]
