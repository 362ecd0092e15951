"""Losses on pairs, against values worked out by hand, a plain loop, and what holds whatever the numbers."""

import math
from typing import get_args

import pytest
import torch

from stages.lib.objectives.preference_losses import PREFERENCE_LOSSES, PairBatch, implicit_rewards, ipo, sigmoid
from stages.lib.settings.preference_loss import IpoLoss, PreferenceLoss, SigmoidLoss

EACH = (SigmoidLoss(type="sigmoid", beta=0.2, label_smoothing=0.1), IpoLoss(type="ipo", beta=0.2))


def with_settings(beta: float = 0.1, label_smoothing: float = 0.0) -> SigmoidLoss:
    return SigmoidLoss(type="sigmoid", beta=beta, label_smoothing=label_smoothing)


def one_pair(
    policy_chosen: float, policy_rejected: float, reference_chosen: float, reference_rejected: float, *lengths: int
) -> PairBatch:
    logps = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return PairBatch(*(torch.tensor([value]) for value in (*logps, *(lengths or (1, 1)))))


def random_pairs(pairs: int = 6) -> PairBatch:
    generator = torch.Generator().manual_seed(0)
    logps = [-20 + 4 * torch.randn(pairs, dtype=torch.float64, generator=generator) for _ in range(4)]
    return PairBatch(*logps, torch.arange(1, pairs + 1), torch.arange(pairs + 1, 1, -1))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def test_sigmoid_by_hand() -> None:
    # Δ_c = -10 - -12 = 2, Δ_r = -11 - -10 = -1, h = 3, β h = 0.3: log(1 + e^-0.3) = 0.554355
    # Summing where it should subtract (h = 1) gives 0.644397; swapping policy and reference (h = -3) 0.854355.
    loss = sigmoid(one_pair(-10.0, -11.0, -12.0, -10.0), with_settings())
    assert loss.item() == pytest.approx(0.554355, abs=1e-6)


def test_cdpo_by_hand() -> None:
    # β h = 0.3 as above, ε = 0.1: 0.9 * 0.554355 + 0.1 * 0.854355 = 0.584355
    loss = sigmoid(one_pair(-10.0, -11.0, -12.0, -10.0), with_settings(label_smoothing=0.1))
    assert loss.item() == pytest.approx(0.584355, abs=1e-6)


def test_ipo_by_hand() -> None:
    # Δ_c / |y_c| = 2 / 4 = 0.5, Δ_r / |y_r| = -1 / 2 = -0.5, gap 1, target 1 / (2 * 0.1) = 5: (1 - 5)^2 = 16
    # Summed, not averaged: (3 - 5)^2 = 4. One length for both: (3 / 4 - 5)^2 = 18.06.
    loss = ipo(one_pair(-10.0, -11.0, -12.0, -10.0, 4, 2), IpoLoss(type="ipo", beta=0.1))
    assert loss.item() == pytest.approx(16.0, abs=1e-5)


def test_implicit_rewards_by_hand() -> None:
    # Sums, whatever the loss: 0.1 * 2 and 0.1 * -1.
    chosen, rejected = implicit_rewards(one_pair(-10.0, -11.0, -12.0, -10.0, 4, 2), 0.1)
    assert chosen.item() == pytest.approx(0.2)
    assert rejected.item() == pytest.approx(-0.1)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_sigmoid_equals_a_plain_loop(label_smoothing: float) -> None:
    pairs = random_pairs()
    losses = sigmoid(pairs, with_settings(beta=0.3, label_smoothing=label_smoothing))
    for place, loss in enumerate(losses.tolist()):
        policy_c, policy_r, reference_c, reference_r = (values[place].item() for values in pairs[:4])
        logit = 0.3 * ((policy_c - policy_r) - (reference_c - reference_r))
        expected = -(1 - label_smoothing) * log_sigmoid(logit) - label_smoothing * log_sigmoid(-logit)
        assert loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_a_policy_equal_to_its_reference_has_loss_ln_2_and_no_margin(label_smoothing: float) -> None:
    chosen, rejected, _, _, *lengths = random_pairs()
    pairs = PairBatch(chosen, rejected, chosen, rejected, *lengths)
    losses = sigmoid(pairs, with_settings(beta=0.7, label_smoothing=label_smoothing))
    torch.testing.assert_close(losses, torch.full_like(chosen, math.log(2)))
    assert not any(rewards.any() for rewards in implicit_rewards(pairs, 0.7))


def test_swapping_the_pair_swaps_rewards_and_differs_in_loss_by_the_margin() -> None:
    # -log σ(-x) - -log σ(x) = x, and x is the reward margin.
    pairs = random_pairs()
    swapped = PairBatch(*(pairs[place] for place in (1, 0, 3, 2, 5, 4)))
    chosen, rejected = implicit_rewards(pairs, 0.2)
    torch.testing.assert_close((rejected, chosen), implicit_rewards(swapped, 0.2))
    one, other = (sigmoid(batch, with_settings(beta=0.2)) for batch in (pairs, swapped))
    torch.testing.assert_close(other - one, chosen - rejected)


def test_smoothed_loss_is_least_where_the_policy_grants_the_flip_rate() -> None:
    # cDPO's optimum: σ(β h) = 1 - ε, so β h = log(0.8 / 0.2) for ε = 0.2; there the gradient is 0.
    chosen = torch.tensor([math.log(4.0) / 0.5], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(1, dtype=torch.float64)
    pairs = PairBatch(chosen, *[zeros] * 3, *[torch.ones(1)] * 2)
    sigmoid(pairs, with_settings(beta=0.5, label_smoothing=0.2)).backward()
    assert chosen.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_each_loss_of_the_settings_has_its_function_and_is_tested_here() -> None:
    kinds = get_args(get_args(PreferenceLoss)[0])
    assert {get_args(kind.model_fields["type"].annotation)[0] for kind in kinds} == PREFERENCE_LOSSES.keys()
    assert {type(settings) for settings in EACH} == set(kinds)


@pytest.mark.parametrize("settings", EACH, ids=lambda settings: settings.type)
def test_gradient_is_the_numerical_one(settings: PreferenceLoss) -> None:
    pairs = random_pairs()
    loss = PREFERENCE_LOSSES[settings.type]
    assert torch.autograd.gradcheck(
        lambda chosen, rejected: loss(PairBatch(chosen, rejected, *pairs[2:]), settings),
        (pairs.policy_chosen_logps.requires_grad_(), pairs.policy_rejected_logps.requires_grad_()),
    )


def test_logged_rewards_carry_no_gradient_and_far_pairs_stay_finite() -> None:
    policy = torch.tensor([-1e5, 1e5], requires_grad=True)
    pairs = PairBatch(policy, *[torch.zeros(2)] * 3, *[torch.ones(2)] * 2)
    losses = sigmoid(pairs, with_settings(label_smoothing=0.1))
    losses.sum().backward()
    assert not implicit_rewards(pairs, 0.1)[0].requires_grad
    assert torch.isfinite(losses).all()
    # d/dx of the two branches: -(1 - ε) β at -inf, ε β at +inf.
    torch.testing.assert_close(policy.grad, torch.tensor([-0.09, 0.01]))
