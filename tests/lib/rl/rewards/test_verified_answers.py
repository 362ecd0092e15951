"""The reward for one final answer: a comparison of texts, of finished responses alone."""

import pytest

from stages.lib.data.prompts import Prompt
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rewards.mixture import Mixture, MixturePart
from stages.lib.rl.rewards.scoring import Failure, RewardError
from stages.lib.rl.rewards.verified_answers import FinalAnswer
from stages.lib.settings.declaration import block
from stages.lib.settings.rewards import FinalAnswerReward

SETTINGS = FinalAnswerReward(**block(FinalAnswerReward, answer="right"))


def episode(text: str, ended: bool = True, **facts: object) -> Episode:
    return Episode(Prompt(4, [1], [], facts), [5, 9], text, ended, 0, None, [True] * 2)


@pytest.mark.parametrize(
    ("text", "right", "score"),
    [
        ("3 + 4 = 7\n#### 7", "7", 1.0),
        ("#### 7", 7, 1.0),
        ("#### x = 7 ", " x = 7", 1.0),
        ("#### 7.0", "7", 0.0),
        ("7", "7", 0.0),
        ("#### 6 #### 7", "7", 0.0),
        ("#### 7, I think", "7", 0.0),
    ],
)
def test_the_answer_is_all_that_follows_the_only_mark(text: str, right: str | int, score: float) -> None:
    assert FinalAnswer(SETTINGS)([episode(text, right=right)]) == [score]
    assert FinalAnswer(SETTINGS)([episode(text, ended=False, right=right)]) == [0.0]


@pytest.mark.parametrize(("facts", "found"), [({}, "none"), ({"right": True}, "bool"), ({"right": 7.5}, "float")])
def test_a_row_without_an_answer_ends_the_run_whatever_is_to_be_skipped(facts: dict, found: str) -> None:
    (failure,) = FinalAnswer(SETTINGS)([episode("#### 7", **facts)])
    assert failure == Failure("row", f"expected a text or a whole number in the fact right, found {found}")
    mixture = Mixture({"answer": MixturePart(FinalAnswer(SETTINGS), missing="skip")})
    with pytest.raises(RewardError, match="row 4 of the prompts, response '#### 7': the reward answer fails: expected"):
        mixture([episode("#### 7", **facts)])
