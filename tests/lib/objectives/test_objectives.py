"""The objectives of pairs on hand-made modules: sums, denominators and metrics by hand, however rows are cut."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from stages.lib.objectives.fit import global_means
from stages.lib.objectives.objective import Objective
from stages.lib.objectives.preference import PreferenceObjective
from stages.lib.objectives.reward import RewardObjective, ScoreObjective
from stages.lib.settings.declaration import block
from stages.lib.settings.preference_loss import IpoLoss, SigmoidLoss
from stages.lib.settings.reward_loss import PairwiseLoss
from tests.tiny_models import batching


class Unigram(nn.Module):
    """log π of token v is `logps[v]` wherever it stands."""

    def __init__(self, *logps: float) -> None:
        super().__init__()
        self.logps = nn.Parameter(torch.tensor(logps))

    def forward(
        self, ids: torch.Tensor, _attention: Any, _positions: Any, mask: torch.Tensor, run: str = "log_probs"
    ) -> tuple:
        """As details 0.5 nats of entropy, logits of mean 2 and log-collisions of −1 for every token."""
        logps = torch.where(mask, self.logps[ids], 0.0)
        if run == "log_probs":
            return logps, None
        return logps, *(torch.where(mask, value, 0.0) for value in (0.5, 2.0, -1.0))

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


class LastToken(nn.Module):
    """The score of a sequence is `scores[its last token]`."""

    def __init__(self, *scores: float) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores))

    def forward(self, ids: torch.Tensor, _attention: Any, _positions: Any, end_mask: torch.Tensor) -> torch.Tensor:
        return self.scores[ids[end_mask]]

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


PAIRS = {
    "prompt_ids": [[0], [0, 0]],
    "chosen_ids": [[1, 1], [2]],
    "rejected_ids": [[2], [3, 3, 3]],
    "margin": [0.5, 0.25],
    "reference_chosen_logps": [-5.0, -1.0],
    "reference_rejected_logps": [-1.0, -13.0],
}
CUTS = pytest.mark.parametrize("tokens", [1, 7, 100])  # a row a pass, two passes, one


PAIRWISE = PairwiseLoss(**block(PairwiseLoss))


@CUTS
def test_reward_by_hand(tokens: int) -> None:
    module = LastToken(0.0, 2.0, 2.0, 1.0)
    # Scores: 2 and 2, a tie; 2 and 1.
    found = global_means(RewardObjective(batching(tokens), PAIRWISE), module, PAIRS, train=True)
    assert found == pytest.approx(
        {
            "loss": (math.log(2) + math.log1p(math.exp(-1))) / 2,
            "accuracy": 0.75,
            "rewards/chosen": 2.0,
            "rewards/rejected": 1.5,
            "rewards/margins": 0.5,
            "rewards/squares": (4 + 4 + 4 + 1) / 4,
        }
    )
    # d/dx of -log σ(x) is -σ(-x): -1/2 for the tie, -0.268941 for x = 1; over 2 pairs.
    assert module.scores.grad.tolist() == pytest.approx([0.0, -0.25, 0.25 - 0.134471, 0.134471], abs=1e-6)


def test_a_margin_moves_the_loss_alone() -> None:
    module = LastToken(0.0, 2.0, 2.0, 1.0)
    without, with_margin = (
        global_means(RewardObjective(batching(100), loss), module, PAIRS, train=False)
        for loss in (PAIRWISE, PAIRWISE.model_copy(update={"use_margin": True}))
    )
    expected = (math.log1p(math.exp(0.5)) + math.log1p(math.exp(-0.75))) / 2
    assert with_margin == pytest.approx(without | {"loss": expected})


@CUTS
def test_smoothing_and_centring_of_rewards_by_hand(tokens: int) -> None:
    module = LastToken(0.0, 2.0, 2.0, 1.0)
    loss = PAIRWISE.model_copy(update={"label_smoothing": 0.1, "centering_coefficient": 0.5})
    found = global_means(RewardObjective(batching(tokens), loss), module, PAIRS, train=True)
    # Gaps 0 and 1: ln 2, and 0.9 ln(1 + e^-1) + 0.1 ln(1 + e); sums of scores 4 and 3, squared and halved.
    smoothed = 0.9 * math.log1p(math.exp(-1)) + 0.1 * math.log1p(math.e)
    assert found["loss"] == pytest.approx((math.log(2) + smoothed + 8 + 4.5) / 2)
    # d/dg: -0.9 / 2 + 0.1 / 2 at 0, -0.9 · 0.268941 + 0.1 · 0.731059 at 1; d/dr of the centring: the sum itself.
    first, second = -0.4, -0.9 * 0.268941 + 0.1 * 0.731059
    expected = [0.0, (first + 4) / 2, (-first + 4 + second + 3) / 2, (-second + 3) / 2]
    assert module.scores.grad.tolist() == pytest.approx(expected, abs=1e-6)


REPLIES = {
    "prompt_ids": [[0], [0, 0], [0]],
    "completion_ids": [[1, 1], [2], [1, 3, 3]],
    "score": [1.5, 2.0, -1.0],
}


@CUTS
def test_a_regression_on_scores_by_hand(tokens: int) -> None:
    module, objective = LastToken(0.0, 2.0, 3.0, 1.0), ScoreObjective(batching(tokens))
    # Rewards 2, 3 and 1: errors 0.5, 1 and 2.
    assert global_means(objective, module, REPLIES, train=True) == pytest.approx(
        {
            "loss": (0.25 + 1 + 4) / 3,
            "rewards/mean": 2.0,
            "rewards/squares": (4 + 9 + 1) / 3,
            "scores/mean": 2.5 / 3,
            "scores/squares": (2.25 + 4 + 1) / 3,
            "scores/products": (3 + 6 - 1) / 3,
        }
    )
    assert module.scores.grad.tolist() == pytest.approx([0.0, 2 * 0.5 / 3, 2 * 1 / 3, 2 * 2 / 3])
    assert objective.units(REPLIES) == 4 + 6


@CUTS
def test_preference_by_hand(tokens: int) -> None:
    module = Unigram(0.0, -1.0, -2.0, -4.0)
    settings = SigmoidLoss(**block(SigmoidLoss))
    found = global_means(PreferenceObjective(batching(tokens), settings), module, PAIRS, train=True)
    # log π: -2 and -2; -2 and -12. Δ: 3 and -1; -1 and 1. β h: 0.4 and -0.2.
    assert found == pytest.approx(
        {
            "loss": (math.log1p(math.exp(-0.4)) + math.log1p(math.exp(0.2))) / 2,
            "rewards/chosen": 0.1,
            "rewards/rejected": 0.0,
            "rewards/margins": 0.1,
            "rewards/accuracies": 0.5,
            "logps/chosen": -2.0,
            "logps/rejected": -7.0,
            "logits/chosen": 2.0,
            "logits/rejected": 2.0,
            "entropy": 0.5,
        },
        abs=1e-6,
    )
    # β σ(-β h) / 2 a nat: 0.0200656 for the first pair, 0.0274917 for the second.
    first, second = 0.05 / (1 + math.exp(0.4)), 0.05 / (1 + math.exp(-0.2))
    assert module.logps.grad.tolist() == pytest.approx([0.0, -2 * first, first - second, 3 * second], abs=1e-6)


def test_ipo_is_given_the_lengths_of_its_own_replies() -> None:
    settings = IpoLoss(**block(IpoLoss, beta=0.5))
    found = global_means(
        PreferenceObjective(batching(100), settings), Unigram(0.0, -1.0, -2.0, -4.0), PAIRS, train=False
    )
    # Δ / |y|: 3/2 and -1; -1 and 1/3. (2.5 - 1)² and (-4/3 - 1)².
    assert found["loss"] == pytest.approx((2.25 + 49 / 9) / 2)


@pytest.mark.parametrize(
    "objective",
    [RewardObjective(batching(100), PAIRWISE), PreferenceObjective(batching(100), IpoLoss(**block(IpoLoss)))],
)
def test_of_a_pair_the_prompt_is_read_twice(objective: Objective) -> None:
    assert objective.units(PAIRS) == 2 * 3 + 3 + 4
