"""The losses of a policy on responses that an earlier one sampled, each with the keys it has; see rl/policy_losses.py.

What a loss is a mean over is part of its name: grpo of responses, each of them a mean of its tokens; dapo of tokens;
dr_grpo of tokens, over a count that is the same in all steps. Each mean is over a whole optimizer step.
"""

from typing import Annotated, Literal, Self

from annotated_types import Gt, Le, Lt
from pydantic import Field, model_validator

from stages.lib.command.json_schema import LARGEST_NUMBER
from stages.lib.settings.bounds import Positive
from stages.lib.settings.declaration import Settings, key

PPO = "arXiv 1707.06347, Eq 7"
GRPO = "arXiv 2402.03300, Eq 3"
DAPO = "arXiv 2503.14476, section 4.1"
GSPO = "arXiv 2507.18071, section 5.1"
Low = Annotated[float, Gt(0), Lt(1)]
AboveOne = Annotated[float, Gt(1), Le(LARGEST_NUMBER)]


def low(default: float, source: str) -> Low:
    """Declare how far the ratio may fall."""
    return key(default, "the ratio counts from 1 − low on", source=source)


def high(default: float, source: str) -> Positive:
    """Declare how far the ratio may rise."""
    return key(default, "the ratio counts up to 1 + high", source=source)


def ratio() -> Literal["token", "sequence"]:
    """Declare what the ratio is one of."""
    return key(
        "token",
        "π / π_old of each token, or of the whole response, a geometric mean over its tokens",
        source="arXiv 2507.18071, Eq 7",
    )


class ClippedLoss(Settings):
    """What the losses share whose ratio is clipped: −min(ρ A, clip(ρ, 1 − low, 1 + high) A)."""

    type: str = key("", "of the loss")
    low: Low = low(0.2, PPO)
    high: Positive = high(0.2, PPO)
    dual_clip: AboveOne | None = key(
        None,
        "δ: where the advantage is negative, the ratio counts up to this; null: without bound, as PPO has it",
        source="dual clip, arXiv 1912.09729, Eq 5; two-sided clipping, arXiv 2505.07291, section 4.1",
    )

    @model_validator(mode="after")
    def _dual_clip_beyond_the_range(self) -> Self:
        if self.dual_clip is not None and self.dual_clip <= 1 + self.high:
            raise ValueError(f"dual_clip ({self.dual_clip}) must be above 1 + high ({1 + self.high})")
        return self


class ClipLoss(ClippedLoss):
    """PPO's, a mean over tokens."""

    type: Literal["clip"] = key("clip", "PPO's clipped ratio, a mean over tokens", source=PPO)


class GrpoLoss(ClippedLoss):
    """GRPO's: a long response counts as much as a short one, so its tokens count less."""

    type: Literal["grpo"] = key("grpo", "GRPO: a mean over responses, of the mean over tokens", source=GRPO)
    ratio: Literal["token", "sequence"] = ratio()


class DapoLoss(ClippedLoss):
    """DAPO's: all tokens count alike, and the ratio may rise further than it may fall."""

    type: Literal["dapo"] = key(
        "dapo", "DAPO: a mean over tokens, with a higher bound", source="arXiv 2503.14476, Eq 8"
    )
    low: Low = low(0.2, DAPO)
    high: Positive = high(0.28, DAPO)
    ratio: Literal["token", "sequence"] = ratio()


class BnpoLoss(ClippedLoss):
    """Another name of dapo: elsewhere a mean over a micro-batch's tokens, which over a whole step is the same."""

    type: Literal["bnpo"] = key("bnpo", "dapo by another name: over a whole optimizer step they are one")
    ratio: Literal["token", "sequence"] = ratio()


class DrGrpoLoss(ClippedLoss):
    """Dr. GRPO's: the divisor does not depend on how long the responses are."""

    type: Literal["dr_grpo"] = key(
        "dr_grpo",
        "Dr. GRPO: the sum over tokens / (responses · max_new_tokens)",
        source="arXiv 2503.20783, section 3.2",
    )
    ratio: Literal["token", "sequence"] = ratio()


class GspoLoss(ClippedLoss):
    """GSPO's: ratio and clipping are of whole responses."""

    type: Literal["gspo"] = key(
        "gspo", "GSPO: one ratio for a response, a mean over responses", source="arXiv 2507.18071, Eq 5 to 7"
    )
    low: Low = low(3e-4, GSPO)
    high: Positive = high(4e-4, GSPO)


class GspoTokenLoss(ClippedLoss):
    """GSPO-token: the response's ratio, and a gradient for each token, whose advantages may differ."""

    type: Literal["gspo_token"] = key(
        "gspo_token", "GSPO's ratio with each token's own advantage and gradient", source="arXiv 2507.18071, Eq 13"
    )
    low: Low = low(3e-4, GSPO)
    high: Positive = high(4e-4, GSPO)


class LuspoLoss(ClippedLoss):
    """LUSPO: GSPO with each response weighted by its length."""

    type: Literal["luspo"] = key(
        "luspo", "LUSPO: GSPO's loss of a response times its length, a mean over responses", source="arXiv 2602.05261"
    )
    low: Low = low(3e-4, "as GSPO")
    high: Positive = high(4e-4, "as GSPO")


class CispoLoss(Settings):
    """CISPO: the ratio is a bounded weight without gradient, and no token loses its own."""

    type: Literal["cispo"] = key(
        "cispo", "CISPO: −min(ρ, largest_ratio) A log π, ρ without gradient", source="arXiv 2506.13585, Eq 4"
    )
    largest_ratio: Positive = key(
        5.0,
        "the ratio itself counts up to this (not 1 + this); below it is unbounded",
        source="arXiv 2510.13786, section 3.2; arXiv 2506.13585 names no value",
    )


class SapoLoss(Settings):
    """SAPO: a smooth gate in place of the clipping."""

    type: Literal["sapo"] = key(
        "sapo", "SAPO: −(4 / τ) σ(τ (ρ − 1)) A, a mean over responses", source="arXiv 2511.20347"
    )
    positive_temperature: Positive = key(1.0, "τ where the advantage is above 0", source="arXiv 2511.20347")
    negative_temperature: Positive = key(
        1.05, "τ elsewhere; larger, since these gradients spread over all other tokens", source="arXiv 2511.20347"
    )


class VespoLoss(Settings):
    """VESPO: the response's ratio, a product over its tokens, shaped into a smooth weight without gradient."""

    type: Literal["vespo"] = key(
        "vespo",
        "VESPO: −exp(λ + k log W − λ W) A log π, W the product of a response's ratios",
        source="arXiv 2602.10693",
    )
    positive_power: Positive = key(2.0, "k where the advantage is not below 0", source="arXiv 2602.10693")
    positive_decay: Positive = key(3.0, "λ where the advantage is not below 0", source="arXiv 2602.10693")
    negative_power: Positive = key(3.0, "k where the advantage is below 0", source="arXiv 2602.10693")
    negative_decay: Positive = key(2.0, "λ where the advantage is below 0", source="arXiv 2602.10693")


PolicyLoss = Annotated[
    GrpoLoss
    | DapoLoss
    | BnpoLoss
    | DrGrpoLoss
    | GspoLoss
    | GspoTokenLoss
    | LuspoLoss
    | CispoLoss
    | SapoLoss
    | VespoLoss,
    Field(discriminator="type"),
]
