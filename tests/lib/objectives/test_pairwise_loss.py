import math

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


def test_a_constant_added_to_all_rewards_changes_nothing():
    chosen, rejected, margins = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]), torch.tensor([0.0, 0.25])
    torch.testing.assert_close(
        pairwise_logistic_losses(chosen + 8, rejected + 8, margins), pairwise_logistic_losses(chosen, rejected, margins)
    )
