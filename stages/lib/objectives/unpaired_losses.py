"""Losses on single replies that are good or bad, from log-probs under policy and reference: one function each.

Each takes n replies and its own settings and returns one loss a reply, (n,); the caller sums, and divides by the
replies of the whole optimizer step. Δ = log π(y|x) − log π_ref(y|x), and s is +1 for a good reply and −1 for a bad one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from stages.lib.settings.unpaired_loss import ApoZeroUnpairedLoss, BcoLoss, KtoLoss


class ReplyBatch(NamedTuple):
    """n replies, as a loss sees them."""

    policy_logps: torch.Tensor  # (n,), sums over a completion, EOS included
    reference_logps: torch.Tensor  # (n,)
    labels: torch.Tensor  # (n,), True for good replies
    shift: float = 0.0  # what an implicit reward is measured from, the same for the whole step, without gradient

    @property
    def log_ratios(self) -> torch.Tensor:
        """Δ, (n,)."""
        return self.policy_logps - self.reference_logps

    @property
    def signs(self) -> torch.Tensor:
        """s, (n,), of the type of the log-ratios."""
        return torch.where(self.labels, 1.0, -1.0).to(self.policy_logps.dtype)


def kto(replies: ReplyBatch, settings: KtoLoss) -> torch.Tensor:
    """λ (1 − σ(s β (Δ − z0))), λ = λ_D of good replies and λ_U of bad ones; first value λ / 2.

    KTO (arXiv 2402.01306); the shift is z0 = max(0, mean of Δ over replies to other prompts), in nats: an estimate of
    the KL of policy and reference. As in the paper no gradient passes through it.
    """
    weights = torch.where(replies.labels, settings.desirable_weight, settings.undesirable_weight)
    values = replies.signs * settings.beta * (replies.log_ratios - replies.shift)
    return weights.to(values.dtype) * torch.sigmoid(-values)


def bco(replies: ReplyBatch, settings: BcoLoss) -> torch.Tensor:
    """−log σ(s (β Δ − δ)); first value log 2.

    BCO (arXiv 2404.04656); the shift is δ, the mean of β Δ over all replies of this optimizer step and those before it.
    """
    return -F.logsigmoid(replies.signs * (settings.beta * replies.log_ratios - replies.shift))


def apo_zero_unpaired(replies: ReplyBatch, settings: ApoZeroUnpairedLoss) -> torch.Tensor:
    """1 − σ(β Δ) of a good reply, σ(β Δ) of a bad one; first value ½.

    APO-zero (arXiv 2408.06266, Eq. 7), whose two terms need not be of one prompt.
    """
    return torch.sigmoid(-replies.signs * settings.beta * replies.log_ratios)


UNPAIRED_LOSSES: dict[str, Callable[[ReplyBatch, Any], torch.Tensor]] = {
    "kto": kto,
    "bco": bco,
    "apo_zero_unpaired": apo_zero_unpaired,
}
