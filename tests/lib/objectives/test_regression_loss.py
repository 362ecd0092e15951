import mpmath
import pytest
import torch

from stages.lib.objectives.regression_loss import squared_errors


def test_by_hand():
    losses = squared_errors(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 2.0, 3.0]))
    assert losses.tolist() == [0.25, 16.0, 0.0]


def test_losses_and_gradients_in_float64_are_those_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(8, 2, dtype=torch.float64, generator=generator) * 5
    extreme = torch.tensor([[a * 1e4, b * 1e4] for a in (-1, 0, 1) for b in (-1, 0, 1)], dtype=torch.float64)
    rewards, scores = torch.cat([drawn, extreme]).T
    rewards = rewards.clone().requires_grad_()
    losses = squared_errors(rewards, scores)
    losses.sum().backward()
    with mpmath.workdps(60):
        step = mpmath.mpf(10) ** -20
        for loss, gradient, r, s in zip(
            losses.tolist(), rewards.grad.tolist(), rewards.tolist(), scores.tolist(), strict=True
        ):
            r, s = mpmath.mpf(r), mpmath.mpf(s)
            assert loss == pytest.approx(float((r - s) ** 2), rel=1e-12)
            difference = ((r + step - s) ** 2 - (r - step - s) ** 2) / (2 * step)
            assert gradient == pytest.approx(float(difference), rel=1e-12)


def test_half_precision_is_raised_before_the_subtraction():
    losses = squared_errors(torch.tensor([10.0], dtype=torch.bfloat16), torch.tensor([9.99]))
    assert losses.dtype == torch.float32
    assert losses.item() == pytest.approx(1e-4, rel=1e-3)
