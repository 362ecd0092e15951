"""Estimates of the KL divergence from the reference, in a reward or a loss, and the coefficient that weighs it.

The KL that controls the coefficient is, as in Ziegler et al., the mean over samples of the SUM over the response's
tokens, in nats. Some implementations feed the mean over tokens; a target set for the one means nothing for the other.
"""

import math
from typing import Any, Literal

import torch

from stages.lib.rl.log_ratios import ratio_less_one, ratio_of
from stages.lib.settings.kl_controller import AdaptiveKl
from stages.lib.settings.kl_penalty import KlInLoss, KlInReward, KlPenalty, first_kl_coef


def kl_estimate(
    logps: torch.Tensor, reference_logps: torch.Tensor, kind: Literal["k1", "k2", "k3"] = "k1"
) -> torch.Tensor:
    """Per-token estimates of KL(policy || reference) from tokens sampled by the policy, d = logp - reference logp.

        k1  d                  unbiased, may be negative; the one to use in a detached reward
        k2  d^2 / 2            biased, never negative; as a loss its gradient is that of the KL
        k3  exp(-d) - 1 + d    unbiased, never negative

    Source: J. Schulman, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html; arXiv 2510.01555.

    Args:
        logps, reference_logps: in nats, both at the sampling temperature, (b, t).
    Returns:
        (b, t). Positions that do not count are the caller's to mask (with `where`).
    """
    log_ratio = logps - reference_logps
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio**2 / 2
    if kind == "k3":
        return ratio_less_one(-log_ratio) + log_ratio
    raise ValueError(f"kind of KL estimate must be k1, k2 or k3, found {kind!r}")


def kl_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    reference_logps: torch.Tensor,
    response_mask: torch.Tensor,
    settings: KlInLoss,
) -> torch.Tensor:
    """The estimate of each token's KL that is differentiated in a loss, for the caller to weigh and sum.

    On tokens that the policy itself sampled, the mean gradient of k2 is that of KL(policy || reference) and that of k3
    is that of KL(reference || policy). The tokens are an earlier policy's, though. The bias correction (arXiv
    2512.02556, section 3.1) multiplies by rho = exp(logp - old logp), so that the mean is over the policy's tokens:
    with k3, whose mean is the KL, rho carries gradient; with k2, whose gradient is right and whose mean is not, it
    carries none. Either way the gradient is rho d times that of logp, that of KL(policy || reference), and is written
    so: the exponentials of k3, which cancel, may be beyond all numbers.

    Args:
        logps: of the policy, with gradient, in nats, (b, t); `old_logps` those of the policy that sampled, and
            `reference_logps` those of the reference, all at the sampling temperature.
        response_mask: True on response tokens, (b, t).
    Returns:
        (b, t), 0 outside the mask, where inputs may hold anything.
    """
    log_ratio = torch.where(response_mask, logps - reference_logps.detach(), 0.0)
    estimate = kl_estimate(log_ratio, torch.zeros_like(log_ratio), settings.estimator)
    if not settings.bias_correction:
        return estimate
    ratio, held = ratio_of(torch.where(response_mask, logps - old_logps, 0.0)).detach(), log_ratio.detach()
    return ratio * (estimate.detach() + held * (log_ratio - held))


class FixedKLController:
    """A coefficient that stays as it is.

    Raises:
        ValueError: a negative coefficient, which would reward leaving the reference.
    """

    def __init__(self, coef: float) -> None:
        self.coef = _checked_coefficient(coef)

    def update(self, kl: float, samples: int) -> None:
        """Does nothing; here so that a loop need not know which controller it has."""

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coef = state["coef"]


class AdaptiveKLController:
    """A coefficient that is steered so that the KL stays near a target (arXiv 1909.08593, section 2.2).

        coef <- coef * (1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon)

    Args:
        initial_coef: above 0 (0 could never change).
        target: KL to hold, in nats, mean over samples of the sum over a response's tokens.
        horizon: number of samples over which a full correction of 20 % is spread.
    Raises:
        ValueError: a target or horizon that is not above 0, a coefficient that is not above 0.
    """

    def __init__(self, initial_coef: float, target: float, horizon: float) -> None:
        self.coef = _checked_coefficient(initial_coef)
        if self.coef == 0:
            raise ValueError("the initial KL coefficient must be above 0: multiplied, a 0 stays 0")
        if not target > 0:
            raise ValueError(f"the KL target must be above 0, found {target}")
        if not horizon > 0:
            raise ValueError(f"the KL horizon must be above 0, found {horizon}")
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, samples: int) -> None:
        """Take in the KL of `samples` new rollouts (over all processes).

        Args:
            kl: mean over these samples of the sequence sum of per-token KL, in nats; may be negative with k1.
            samples: rollouts since the last update.
        Raises:
            ValueError: a KL that is no finite number; samples not in [0, 5 * horizon), since with more the coefficient
                could fall to 0 or below in one update.
        """
        if not math.isfinite(kl):
            raise ValueError(f"the KL to the reference is {kl}: the policy or the reference gives broken log-probs")
        if not 0 <= samples < 5 * self.horizon:
            raise ValueError(
                f"{samples} samples in one update with a KL horizon of {self.horizon}: "
                "the horizon must be above a fifth of the samples of one update"
            )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * samples / self.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coef = state["coef"]


def new_controller(kl: KlPenalty) -> FixedKLController | AdaptiveKLController:
    """The controller of the coefficient: one that stays at 0 where there is no KL."""
    if isinstance(kl, KlInReward | KlInLoss) and isinstance(kl.controller, AdaptiveKl):
        return AdaptiveKLController(kl.controller.coef, kl.controller.target, kl.controller.horizon)
    return FixedKLController(first_kl_coef(kl))


def _checked_coefficient(coef: float) -> float:
    if not coef >= 0:
        raise ValueError(f"the KL coefficient must not be negative, found {coef}")
    return float(coef)
