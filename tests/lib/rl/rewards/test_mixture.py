"""A reward that is a sum of several: values by hand, what applies where, and what is said of failures."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stages.lib.command.errors import StageError
from stages.lib.data.prompts import Prompt
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rewards.mixture import Mixture, MixturePart
from stages.lib.rl.rewards.reward_metrics import reward_metrics, with_parts
from stages.lib.rl.rewards.scoring import Failure, RewardScore
from stages.lib.rl.rollouts import Rollouts
from stages.lib.settings.reward_columns import reward_columns
from stages.lib.settings.reward_part import RowsWhere

FACTS: list[dict[str, Any]] = [{"task": "sums", "hard": True}, {"task": "tales", "hard": 1}, {"task": "sums"}]
EPISODES = [
    Episode(Prompt(10 + row, [1], [], facts, {}, "ab"[row % 2]), [2, 3], f"reply {row}", True, 0, None, [True] * 2)
    for row, facts in enumerate(FACTS)
]
LATE = Failure("timeout", "it took more than 2 s")


def saying(*scores: RewardScore) -> Callable:
    """Gives each episode asked of the score of its row."""
    return lambda episodes: [scores[episode.prompt.row - 10] for episode in episodes]


def where(fact: str, value: Any) -> RowsWhere:
    return RowsWhere(fact=fact, value=value)


def test_the_sum_is_over_those_that_apply() -> None:
    mixture = Mixture(
        {
            "model": MixturePart(saying(1.0, 2.0, 3.0), 0.5),
            "sums": MixturePart(saying(10.0, 20.0, None), 2.0, where("task", "sums")),
            "seen": MixturePart(saying(7.0, 7.0, 7.0), 0.0),
        }
    )
    found = mixture.scored(EPISODES)
    assert found.totals == [20.5, 1.0, 1.5] == mixture(EPISODES)
    assert found.parts == {"model": [1.0, 2.0, 3.0], "sums": [10.0, None, None], "seen": [7.0] * 3}


@pytest.mark.parametrize(
    ("fact", "value", "rows"),
    [("hard", True, [0]), ("hard", 1, [1]), ("source", "b", [1]), ("task", "sums", [0, 2]), ("none", "x", [])],
)
def test_a_fact_chooses_the_rows(fact: str, value: Any, rows: list[int]) -> None:
    asked = []
    mixture = Mixture(
        {
            "all": MixturePart(saying(0.0, 0.0, 0.0)),
            "some": MixturePart(
                lambda episodes: [asked.append(one.prompt.row - 10) or 1.0 for one in episodes],
                where=where(fact, value),
            ),
        }
    )
    assert [row for row, total in enumerate(mixture(EPISODES)) if total] == rows == asked


def test_a_failure_stops_or_counts_as_missing() -> None:
    parts = {
        "model": MixturePart(saying(1.0, 2.0, 3.0)),
        "late": MixturePart(saying(1.0, LATE, math.nan), missing="skip"),
    }
    found = Mixture(parts).scored(EPISODES)
    assert found.totals == [2.0, 2.0, 3.0]
    assert found.parts["late"][1] == LATE
    with pytest.raises(StageError, match=r"^row 11 of the prompts, response 'reply 1': the reward late fails: it took"):
        Mixture(parts | {"late": parts["late"]._replace(missing="stop")}).scored(EPISODES)
    with pytest.raises(StageError, match=r"row 12 .* the reward model fails: it gives inf; expected a number within"):
        Mixture({"model": MixturePart(saying(1.0, 2.0, math.inf))}).scored(EPISODES)
    with pytest.raises(StageError, match=r"row 12 .* fails: it gives -1e\+30; expected a number within ±1e\+09"):
        Mixture({"model": MixturePart(saying(1.0, 2.0, -1e30))}).scored(EPISODES)


def test_a_row_to_which_nothing_applies_stops_the_run() -> None:
    """A reward of weight 0 is measured, and says nothing to learn from."""
    parts = {
        "sums": MixturePart(saying(1.0, 1.0, 1.0), where=where("task", "sums")),
        "seen": MixturePart(saying(1.0, 1.0, 1.0), 0.0),
    }
    with pytest.raises(StageError, match=r"row 11 .* no reward applies to it \(sums, seen\)"):
        Mixture(parts).scored(EPISODES)


def test_metrics_are_split_by_name_and_source() -> None:
    parts = {"model": [1.0, 2.0, 4.0], "late": [None, LATE, 5.0]}
    numbers = torch.zeros(3, 2)
    rollouts = with_parts(Rollouts(EPISODES, *[numbers] * 7), parts)
    assert rollouts.parts["late"].isnan().tolist() == [True, True, False]
    found = reward_metrics(rollouts)
    assert found["rewards/model"] == pytest.approx(7 / 3)
    assert {name: value for name, value in found.items() if name != "rewards/model"} == {
        **{"rewards/model/a": 2.5, "rewards/model/b": 2.0, "rewards/late": 5.0, "rewards/late/a": 5.0},
        **{"reward_errors/model": 0.0, "reward_timeouts/model": 0.0},
        **{"reward_errors/late": 0.0, "reward_timeouts/late": 1.0},
    }
    assert found.keys() <= {*reward_columns(["model", "late"], "aba")}
    alone = with_parts(rollouts, {"reward_model": [1.0, 2.0, 3.0]})
    assert reward_metrics(alone)["rewards/reward_model/a"] == 2.0
    assert reward_metrics(alone).keys() == {*reward_columns(["reward_model"], "aba")}


def test_a_reward_model_alone_on_one_source_is_the_score() -> None:
    numbers = torch.zeros(2, 2)
    alone = with_parts(Rollouts(EPISODES[::2], *[numbers] * 7), {"reward_model": [1.0, 3.0]})
    assert (reward_metrics(alone), reward_columns(["reward_model"], "aa")) == ({}, ())
