import math

import mpmath
import pytest
import torch

from stages.lib.objectives.pairwise_loss import pairwise_logistic_losses


def test_hand_worked_values():
    # gap 1 - 0 - 0 = 1:     log(1 + e^-1)   = 0.313262
    # gap 0 - 0 - 0 = 0:     log 2           = 0.693147
    # gap 2 - 0.5 - 0.5 = 1: as the first; a margin added instead of subtracted would give log(1 + e^-2) = 0.126928
    # gap 0 - 2 - 0 = -2:    log(1 + e^2)    = 2.126928
    losses = pairwise_logistic_losses(
        torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.tensor([0.0, 0.0, 0.5, 2.0]), torch.tensor([0.0, 0.0, 0.5, 0.0])
    )
    torch.testing.assert_close(losses, torch.tensor([0.313262, 0.693147, 0.313262, 2.126928]), atol=1e-6, rtol=0)


def test_far_apart_rewards_keep_finite_losses_and_gradients():
    # log(1 + exp(r_r - r_c)) written out is inf with a NaN gradient from a gap of 89 on.
    chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
    losses = pairwise_logistic_losses(chosen, torch.zeros(2), torch.zeros(2))
    losses.sum().backward()
    assert losses.tolist() == [1e4, 0.0]
    assert chosen.grad.tolist() == [-1.0, 0.0]


def test_half_precision_rewards_are_raised_before_the_subtraction():
    # 10.0 and 9.9375 are exact in bfloat16; 0.0625 - 0.01 = 0.0525 is not.
    chosen = torch.tensor([10.0], dtype=torch.bfloat16)
    rejected = torch.tensor([9.9375], dtype=torch.bfloat16)
    losses = pairwise_logistic_losses(chosen, rejected, torch.tensor([0.01]))
    assert losses.dtype == torch.float32
    assert losses.item() == pytest.approx(math.log1p(math.exp(-0.0525)), abs=1e-7)


def test_gradient_is_the_numerical_one():
    generator = torch.Generator().manual_seed(0)
    rewards = [torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(
        lambda chosen, rejected: pairwise_logistic_losses(chosen, rejected, torch.full((5,), 0.3)), rewards
    )


VARIANTS = [
    {"label_smoothing": smoothing, "centering_coefficient": centering}
    for smoothing in (0.0, 0.1, 0.49)
    for centering in (0.0, 0.01, 2.0)
]


def independent_loss(chosen, rejected, margin, *, label_smoothing, centering_coefficient):
    """The formula as it stands, in 60 digits."""
    with mpmath.workdps(60):
        gap = mpmath.mpf(chosen) - mpmath.mpf(rejected) - mpmath.mpf(margin)
        said, other = (-mpmath.log(1 / (1 + mpmath.exp(-side * gap))) for side in (1, -1))
        centring = mpmath.mpf(centering_coefficient) * (mpmath.mpf(chosen) + mpmath.mpf(rejected)) ** 2
        return (1 - mpmath.mpf(label_smoothing)) * said + mpmath.mpf(label_smoothing) * other + centring


def example_scores():
    """Scores of pairs with their margins: at random, and as far apart as no model gives them."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(12, 3, dtype=torch.float64, generator=generator) * 4
    extreme = [[s * 1e4, t * 1e4, m] for s in (-1, 0, 1) for t in (-1, 0, 1) for m in (0.0, 3.0)]
    rows = torch.cat([drawn, torch.tensor(extreme, dtype=torch.float64)])
    return rows[:, 0], rows[:, 1], rows[:, 2].abs()


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_in_float64_are_those_of_the_formula(variant):
    chosen, rejected, margins = example_scores()
    chosen, rejected = chosen.requires_grad_(), rejected.requires_grad_()
    losses = pairwise_logistic_losses(chosen, rejected, margins, **variant)
    losses.sum().backward()
    for place, row in enumerate(zip(chosen.tolist(), rejected.tolist(), margins.tolist(), strict=True)):
        assert losses[place].item() == pytest.approx(float(independent_loss(*row, **variant)), rel=1e-12, abs=1e-12)
        step = mpmath.mpf(10) ** -20  # differences of 60-digit numbers, so no rounding of float64 is in them
        for side, gradient in ((0, chosen.grad), (1, rejected.grad)):
            with mpmath.workdps(60):
                above, below = (
                    independent_loss(*(mpmath.mpf(x) + s * step * (i == side) for i, x in enumerate(row)), **variant)
                    for s in (1, -1)
                )
                difference = (above - below) / (2 * step)
            assert gradient[place].item() == pytest.approx(float(difference), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_stay_finite_in_float32(variant):
    chosen, rejected, margins = (values.float() for values in example_scores())
    chosen.requires_grad_()
    losses = pairwise_logistic_losses(chosen, rejected, margins, **variant)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(chosen.grad).all()


def test_smoothed_labels_have_their_minimum_at_their_own_odds():
    """-(1 - e) log σ(g) - e log σ(-g) is the entropy of e at g = log((1 - e) / e), and grows to both sides."""
    best, margin, e = math.log(0.9 / 0.1), 0.25, 0.1
    chosen = torch.tensor([best + margin, best + margin - 0.1, best + margin + 0.1], dtype=torch.float64)
    zeros = torch.zeros(3, dtype=torch.float64)
    losses = pairwise_logistic_losses(chosen, zeros, torch.full((3,), margin), label_smoothing=e).tolist()
    assert losses[0] == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    assert min(losses) == losses[0]


def test_centring_tells_scores_apart_that_differ_by_a_constant():
    chosen, rejected = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 1.0])
    losses = pairwise_logistic_losses(chosen, rejected, torch.zeros(2), centering_coefficient=0.01)
    assert (losses[1] - losses[0]).item() == pytest.approx(0.01 * 4**2)


def test_a_constant_added_to_all_rewards_changes_nothing():
    chosen, rejected, margins = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]), torch.tensor([0.0, 0.25])
    torch.testing.assert_close(
        pairwise_logistic_losses(chosen + 8, rejected + 8, margins), pairwise_logistic_losses(chosen, rejected, margins)
    )
