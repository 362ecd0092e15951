"""Policies that are far apart: ratios, losses and their gradients stay finite, and near each other nothing changes."""

import math

import pytest
import torch

from stages.lib.rl.kl_control import kl_estimate, kl_loss
from stages.lib.rl.log_ratios import LARGEST, ratio_less_one, ratio_of
from stages.lib.rl.policy_losses import POLICY_LOSSES, policy_terms
from stages.lib.settings.declaration import block
from stages.lib.settings.kl_penalty import KlInLoss
from stages.lib.settings.policy_loss import ClipLoss, PolicyLoss

FAR = torch.tensor([[-500.0, -100.0, 100.0, 500.0]])
MASK = torch.ones_like(FAR, dtype=torch.bool)
LOSSES = (ClipLoss, *PolicyLoss.__args__[0].__args__)


def test_near_each_other_they_are_the_exponentials_to_the_last_bit() -> None:
    near = torch.linspace(-60, LARGEST, 4001)
    assert torch.equal(ratio_of(near), near.exp())
    assert torch.equal(ratio_less_one(near), torch.expm1(near))


def test_far_from_each_other_they_are_tangents() -> None:
    moving = torch.tensor([LARGEST + 80], dtype=torch.float64, requires_grad=True)
    for function, less in ((ratio_of, 0.0), (ratio_less_one, 1.0)):
        value = function(moving)
        (slope,) = torch.autograd.grad(value, moving)
        assert float(value.detach()) == pytest.approx(math.exp(LARGEST) * 81 - less)
        assert float(slope) == pytest.approx(math.exp(LARGEST))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_every_loss_and_its_gradient_is_finite(loss: type, advantage: float) -> None:
    """As float32's e^100 is not; with an advantage of 0 inf · 0 would be NaN."""
    moving = (FAR - 600).requires_grad_()
    terms = policy_terms(
        moving, torch.full_like(FAR, -600.0), torch.full_like(FAR, advantage), MASK, loss(**block(loss))
    )
    (gradient,) = torch.autograd.grad(terms.losses.sum(), moving)
    assert all(bool(values.isfinite().all()) for values in (terms.losses, terms.approx_kl, gradient))
    assert loss(**block(loss)).type in POLICY_LOSSES


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("corrected", [False, True])
def test_the_kl_in_the_loss_still_draws_a_policy_back(estimator: str, corrected: bool) -> None:
    """Tokens that the reference finds likelier, by 100 and 500 nats, are to become likelier, and others less so."""
    moving = (FAR - 600).requires_grad_()
    settings = KlInLoss(**block(KlInLoss, estimator=estimator, bias_correction=corrected))
    of_tokens = kl_loss(moving, (FAR - 600), torch.full_like(FAR, -600.0), MASK, settings)
    (gradient,) = torch.autograd.grad(of_tokens.sum(), moving)
    assert bool(of_tokens.isfinite().all())
    assert bool(gradient.isfinite().all())
    assert (gradient.sign() == FAR.sign()).all()
    assert bool(kl_estimate(moving, torch.full_like(FAR, -600.0), estimator).isfinite().all())
