"""Where the KL to the reference acts in training on a policy's own responses: nowhere, in the reward, in the loss.

The estimators are those of rl/kl_control.py. In the reward, which carries no gradient, k1 is right: its mean is the KL.
In the loss the gradient counts: that of k2 is the gradient of KL(policy || reference); that of k3 is the gradient of
KL(reference || policy), the other divergence, with another optimum; that of k1 is 0 in the mean, and so is refused.
"""

import os
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from stages.lib.settings.declaration import Settings, block, key
from stages.lib.settings.kl_controller import AdaptiveKl, FixedKl, KlController

SCHULMAN = "J. Schulman, http://joschu.net/blog/kl-approx.html; arXiv 2510.01555"


class NoKl(Settings):
    """No tie to a reference, of which none is loaded."""

    type: Literal["none"] = key("none", "no KL, and no reference: name the entry's own model as its reference")


class KlInReward(Settings):
    """Each token's reward is less by the coefficient times its KL."""

    type: Literal["in_reward"] = key(
        "in_reward", "taken off the reward of each token", source="arXiv 1909.08593, Eq 2; arXiv 2203.02155, Eq 2"
    )
    estimator: Literal["k1", "k2", "k3"] = key(
        "k1", "of each token's KL; k1, the log-ratio, is the one that is right in a reward", source=SCHULMAN
    )
    controller: KlController = key(block(FixedKl), "of the coefficient")


class KlInLoss(Settings):
    """The coefficient times each token's KL is added to the policy's loss."""

    type: Literal["in_loss"] = key(
        "in_loss", "added to the loss of each token, and never clipped", source="arXiv 2402.03300, Eq 3"
    )
    estimator: Literal["k2", "k3"] = key(
        "k2",
        "of each token's KL; k2: its gradient is that of KL(policy || reference) | k3: that of KL(reference || "
        "policy), as GRPO has it",
        source=SCHULMAN,
    )
    controller: KlController = key(block(FixedKl), "of the coefficient")
    bias_correction: bool = key(
        False,
        "weigh each token's KL by π(y_t) / π_old(y_t), which holds the gradient (k3: makes it, too, that of KL(policy "
        "|| reference)) at what it is for tokens of the policy itself",
        source="DeepSeek-V3.2, arXiv 2512.02556, section 3.1",
    )

    @field_validator("estimator", mode="before")
    @classmethod
    def _not_k1(cls, value: Any) -> Any:
        if value == "k1":
            raise ValueError("k1 in the loss has a gradient of mean 0, so it holds nothing; write k2 (or k3, as GRPO)")
        return value


KlPenalty = Annotated[NoKl | KlInReward | KlInLoss, Field(discriminator="type")]


def first_kl_coef(kl: KlPenalty) -> float:
    """The coefficient that training starts with."""
    return 0.0 if isinstance(kl, NoKl) else kl.controller.coef


def kl_needs_reference(kl: KlPenalty) -> bool:
    """Whether a reference model takes part."""
    return first_kl_coef(kl) > 0


def refuse_short_horizon(kl: KlPenalty, responses: int) -> None:
    """Raise ValueError for an adaptive controller that the responses of one phase could take to 0 or below."""
    controller = None if isinstance(kl, NoKl) else kl.controller
    if isinstance(controller, AdaptiveKl) and responses >= 5 * controller.horizon:
        raise ValueError(
            f"kl.controller.horizon ({controller.horizon}) must be more than a fifth of rollout_batch_size times "
            f"samples_per_prompt ({responses})"
        )


def refuse_unread_reference(kl: KlPenalty, model: str, reference: str) -> None:
    """Raise ValueError for a reference, other than the entry's model, that nothing would read."""
    if not kl_needs_reference(kl) and os.path.normpath(reference) != os.path.normpath(model):
        raise ValueError(
            f"reference: with kl.type {kl.type} and a coefficient of 0 nothing reads it, and DVC would wait for "
            f"{reference}; give it the value of model, {model}"
        )
