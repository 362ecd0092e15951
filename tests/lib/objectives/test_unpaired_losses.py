"""Each loss on single replies against the paper's formula in NumPy's float64, with gradients, on any inputs."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from stages.lib.objectives.unpaired_losses import UNPAIRED_LOSSES, ReplyBatch
from stages.lib.settings.unpaired_loss import ApoZeroUnpairedLoss, BcoLoss, KtoLoss

KTO = KtoLoss(type="kto", beta=0.3, desirable_weight=1.25, undesirable_weight=0.75)
BCO = BcoLoss(type="bco", beta=0.2)
APO = ApoZeroUnpairedLoss(type="apo_zero_unpaired", beta=0.4)
# 0, moderate, and what a policy that has gone astray gives.
LOG_RATIOS = np.array([0.0, 0.7, -1.3, 4.0, -6.5, 35.0, -35.0, 100.0, -100.0])
SHIFTS = (0.0, 0.6, 12.5)


def sigma(x: float) -> float:
    """1 / (1 + e^−x), from the side on which the exponential does not overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    """log(1 + e^x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def kto_of_paper(log_ratio: float, good: bool, z0: float, settings: KtoLoss) -> float:
    """λ_y − v(x, y), with v = λ_D σ(β (r − z0)) or λ_U σ(β (z0 − r))."""
    if good:
        return settings.desirable_weight * (1 - sigma(settings.beta * (log_ratio - z0)))
    return settings.undesirable_weight * (1 - sigma(settings.beta * (z0 - log_ratio)))


def bco_of_paper(log_ratio: float, good: bool, delta: float, settings: BcoLoss) -> float:
    """The cross-entropy of a classifier with the logit β log π/π_ref − δ."""
    logit = settings.beta * log_ratio - delta
    return softplus(-logit) if good else softplus(logit)


def apo_of_paper(log_ratio: float, good: bool, _shift: float, settings: ApoZeroUnpairedLoss) -> float:
    """1 − σ(β r) of a good reply, σ(β r) of a bad one."""
    return 1 - sigma(settings.beta * log_ratio) if good else sigma(settings.beta * log_ratio)


EACH = pytest.mark.parametrize(
    ("settings", "of_paper"), [(KTO, kto_of_paper), (BCO, bco_of_paper), (APO, apo_of_paper)], ids=UNPAIRED_LOSSES
)


def losses_of(settings: Any, log_ratios: torch.Tensor, labels: list[bool], shift: float) -> torch.Tensor:
    replies = ReplyBatch(log_ratios - 40.0, torch.full_like(log_ratios, -40.0), torch.tensor(labels), shift)
    return UNPAIRED_LOSSES[settings.type](replies, settings)


@EACH
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("good", [True, False])
def test_values_are_those_of_the_paper(settings: Any, of_paper: Any, shift: float, good: bool) -> None:
    draw = np.random.default_rng(5).normal(scale=8, size=40)
    log_ratios = np.concatenate([LOG_RATIOS, draw])
    expected = [of_paper(float(value), good, shift, settings) for value in log_ratios]
    found = losses_of(settings, torch.tensor(log_ratios), [good] * len(log_ratios), shift)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)
    in_float32 = losses_of(settings, torch.tensor(log_ratios, dtype=torch.float32), [good] * len(log_ratios), shift)
    assert in_float32.dtype == torch.float32
    np.testing.assert_allclose(in_float32.numpy(), expected, rtol=2e-4, atol=1e-5)


@EACH
@pytest.mark.parametrize("shift", SHIFTS)
def test_gradients_are_the_finite_differences_of_the_paper(settings: Any, of_paper: Any, shift: float) -> None:
    labels = [number % 2 == 0 for number in range(len(LOG_RATIOS))]
    log_ratios = torch.tensor(LOG_RATIOS, requires_grad=True)
    losses_of(settings, log_ratios, labels, shift).sum().backward()
    step = 1e-5
    expected = [
        (of_paper(value + step, good, shift, settings) - of_paper(value - step, good, shift, settings)) / (2 * step)
        for value, good in zip(LOG_RATIOS.tolist(), labels, strict=True)
    ]
    np.testing.assert_allclose(log_ratios.grad.numpy(), expected, rtol=1e-5, atol=1e-9)
    in_float32 = torch.tensor(LOG_RATIOS, dtype=torch.float32, requires_grad=True)
    losses_of(settings, in_float32, labels, shift).sum().backward()
    assert torch.isfinite(in_float32.grad).all()
    np.testing.assert_allclose(in_float32.grad.numpy(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "good", "first"),
    [
        (KTO, True, 1.25 / 2),
        (KTO, False, 0.75 / 2),
        (BCO, True, math.log(2)),
        (BCO, False, math.log(2)),
        (APO, True, 0.5),
        (APO, False, 0.5),
    ],
)
def test_first_values(settings: Any, good: bool, first: float) -> None:
    assert losses_of(settings, torch.zeros(1), [good], 0.0).item() == pytest.approx(first)


@pytest.mark.parametrize("settings", [KTO, BCO, APO], ids=UNPAIRED_LOSSES)
def test_a_good_reply_is_made_likelier_and_a_bad_one_less_likely(settings: Any) -> None:
    log_ratios = torch.tensor([0.3, 0.3], requires_grad=True)
    losses_of(settings, log_ratios, [True, False], 0.5).sum().backward()
    assert log_ratios.grad[0] < 0 < log_ratios.grad[1]
