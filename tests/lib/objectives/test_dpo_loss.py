import math

import pytest
import torch

from stages.lib.objectives.dpo_loss import preference_losses


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def random_logps(pairs: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [-20 + 4 * torch.randn(pairs, dtype=torch.float64, generator=generator) for _ in range(4)]


def test_sigmoid_by_hand():
    # D_c = -10 - -12 = 2, D_r = -11 - -10 = -1, h = 3, beta h = 0.3: log(1 + e^-0.3) = 0.554355
    # Summing where it should subtract (h = 1) gives 0.644397; swapping policy and reference (h = -3) 0.854355.
    result = preference_losses(
        *(torch.tensor([x]) for x in (-10.0, -11.0, -12.0, -10.0)), loss_type="sigmoid", beta=0.1
    )
    assert result.losses.item() == pytest.approx(0.554355, abs=1e-6)
    assert result.chosen_rewards.item() == pytest.approx(0.2)
    assert result.rejected_rewards.item() == pytest.approx(-0.1)


def test_cdpo_by_hand():
    # beta h = 0.3 as above, e = 0.1: 0.9 * 0.554355 + 0.1 * 0.854355 = 0.584355
    result = preference_losses(
        *(torch.tensor([x]) for x in (-10.0, -11.0, -12.0, -10.0)), loss_type="sigmoid", beta=0.1, label_smoothing=0.1
    )
    assert result.losses.item() == pytest.approx(0.584355, abs=1e-6)


def test_ipo_by_hand():
    # D_c / L_c = 2 / 4 = 0.5, D_r / L_r = -1 / 2 = -0.5, gap 1, target 1 / (2 * 0.1) = 5: (1 - 5)^2 = 16
    # Summed, not averaged: (3 - 5)^2 = 4. One length for both: (3 / 4 - 5)^2 = 18.06.
    # The implicit rewards stay sums: 0.1 * 2 and 0.1 * -1.
    result = preference_losses(
        *(torch.tensor([x]) for x in (-10.0, -11.0, -12.0, -10.0)),
        loss_type="ipo",
        beta=0.1,
        chosen_lengths=torch.tensor([4]),
        rejected_lengths=torch.tensor([2]),
    )
    assert result.losses.item() == pytest.approx(16.0, abs=1e-5)
    assert result.chosen_rewards.item() == pytest.approx(0.2)
    assert result.rejected_rewards.item() == pytest.approx(-0.1)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_sigmoid_equals_a_plain_loop(label_smoothing):
    logps = random_logps()
    result = preference_losses(*logps, loss_type="sigmoid", beta=0.3, label_smoothing=label_smoothing)
    for pair, loss in enumerate(result.losses.tolist()):
        policy_c, policy_r, reference_c, reference_r = (values[pair].item() for values in logps)
        logit = 0.3 * ((policy_c - policy_r) - (reference_c - reference_r))
        expected = -(1 - label_smoothing) * log_sigmoid(logit) - label_smoothing * log_sigmoid(-logit)
        assert loss == pytest.approx(expected, rel=1e-12)
        assert result.chosen_rewards[pair].item() == pytest.approx(0.3 * (policy_c - reference_c))
        assert result.rejected_rewards[pair].item() == pytest.approx(0.3 * (policy_r - reference_r))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_a_policy_equal_to_its_reference_has_loss_ln_2_and_no_margin(label_smoothing):
    chosen, rejected, *_ = random_logps()
    result = preference_losses(
        chosen, rejected, chosen, rejected, loss_type="sigmoid", beta=0.7, label_smoothing=label_smoothing
    )
    torch.testing.assert_close(result.losses, torch.full_like(chosen, math.log(2)))
    assert not result.chosen_rewards.any()
    assert not result.rejected_rewards.any()


def test_swapping_the_pair_swaps_rewards_and_differs_in_loss_by_the_margin():
    # -log sigmoid(-x) - -log sigmoid(x) = x, and x is the reward margin.
    policy_c, policy_r, reference_c, reference_r = random_logps()
    one = preference_losses(policy_c, policy_r, reference_c, reference_r, loss_type="sigmoid", beta=0.2)
    other = preference_losses(policy_r, policy_c, reference_r, reference_c, loss_type="sigmoid", beta=0.2)
    torch.testing.assert_close(one.chosen_rewards, other.rejected_rewards)
    torch.testing.assert_close(other.losses - one.losses, one.chosen_rewards - one.rejected_rewards)


def test_smoothed_loss_is_least_where_the_policy_grants_the_flip_rate():
    # cDPO's optimum: sigmoid(beta h) = 1 - e, so beta h = log(0.8 / 0.2) for e = 0.2; there the gradient is 0.
    chosen = torch.tensor([math.log(4.0) / 0.5], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(1, dtype=torch.float64)
    preference_losses(chosen, zeros, zeros, zeros, loss_type="sigmoid", beta=0.5, label_smoothing=0.2).losses.backward()
    assert chosen.grad.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("settings", [{"loss_type": "sigmoid", "label_smoothing": 0.1}, {"loss_type": "ipo"}])
def test_gradient_is_the_numerical_one(settings):
    policy_c, policy_r, reference_c, reference_r = random_logps()
    lengths = {"chosen_lengths": torch.arange(1, 7), "rejected_lengths": torch.arange(7, 1, -1)}
    assert torch.autograd.gradcheck(
        lambda c, r: preference_losses(c, r, reference_c, reference_r, beta=0.2, **settings, **lengths).losses,
        (policy_c.requires_grad_(), policy_r.requires_grad_()),
    )


def test_logged_rewards_carry_no_gradient_and_far_pairs_stay_finite():
    policy = torch.tensor([-1e5, 1e5], requires_grad=True)
    zeros = torch.zeros(2)
    result = preference_losses(policy, zeros, zeros, zeros, loss_type="sigmoid", beta=0.1, label_smoothing=0.1)
    result.losses.sum().backward()
    assert not result.chosen_rewards.requires_grad
    assert torch.isfinite(result.losses).all()
    # d/dx of the two branches: -(1 - e) beta at -inf, e beta at +inf.
    torch.testing.assert_close(policy.grad, torch.tensor([-0.09, 0.01]))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"loss_type": "hinge"}, "loss_type"),
        ({"loss_type": "sigmoid", "beta": 0.0}, "beta"),
        ({"loss_type": "sigmoid", "label_smoothing": 0.5}, "label_smoothing"),
        ({"loss_type": "sigmoid", "label_smoothing": -0.1}, "label_smoothing"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss_type": "ipo", "chosen_lengths": None}, "lengths"),
        ({"loss_type": "ipo", "rejected_lengths": None}, "lengths"),
    ],
)
def test_contradictory_settings_are_refused(settings, complaint):
    lengths = {"chosen_lengths": torch.ones(1), "rejected_lengths": torch.ones(1)}
    with pytest.raises(ValueError, match=complaint):
        preference_losses(*[torch.zeros(1)] * 4, **({"beta": 0.1} | lengths | settings))
