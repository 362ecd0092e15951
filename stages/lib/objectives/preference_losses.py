"""Losses on pairs of replies from sums of log-probs under policy and reference: one function each, and their table.

Each takes n pairs and its own settings and returns one loss a pair, (n,), in nats unless it says otherwise; the caller
sums, and divides by the pairs of the whole optimizer step. With the log-ratios Δ_c = log π(y_c|x) − log π_ref(y_c|x)
and Δ_r likewise, h = Δ_c − Δ_r.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from stages.lib.settings.preference_loss import IpoLoss, SigmoidLoss


class PairBatch(NamedTuple):
    """n pairs, as a loss sees them. Every field has shape (n,); log-probs are sums over a completion, EOS included."""

    policy_chosen_logps: torch.Tensor
    policy_rejected_logps: torch.Tensor
    reference_chosen_logps: torch.Tensor
    reference_rejected_logps: torch.Tensor
    chosen_lengths: torch.Tensor  # completion tokens, at least 1
    rejected_lengths: torch.Tensor

    @property
    def chosen_log_ratios(self) -> torch.Tensor:
        """Δ_c, (n,)."""
        return self.policy_chosen_logps - self.reference_chosen_logps

    @property
    def rejected_log_ratios(self) -> torch.Tensor:
        """Δ_r, (n,)."""
        return self.policy_rejected_logps - self.reference_rejected_logps


def sigmoid(pairs: PairBatch, settings: SigmoidLoss) -> torch.Tensor:
    """−(1 − ε) log σ(β h) − ε log σ(−β h)

    ε = 0 is DPO (arXiv 2305.18290, Eq. 7); ε > 0 is cDPO (Mitchell, "A note on DPO with noisy preferences", Eq. 3), for
    labels flipped with probability ε: its optimum is σ(β h) = 1 − ε.
    """
    smoothing = settings.label_smoothing
    scaled_gap = settings.beta * (pairs.chosen_log_ratios - pairs.rejected_log_ratios)
    return -(1 - smoothing) * F.logsigmoid(scaled_gap) - smoothing * F.logsigmoid(-scaled_gap)


def ipo(pairs: PairBatch, settings: IpoLoss) -> torch.Tensor:
    """(Δ_c / |y_c| − Δ_r / |y_r| − 1 / (2β))², in squared nats per token

    IPO (arXiv 2310.12036, Eq. 17), with log-ratios averaged over the tokens of each completion, as its authors
    confirmed to TRL. Implementations that sum give numbers that do not compare with these.
    """
    per_token_gap = pairs.chosen_log_ratios / pairs.chosen_lengths - pairs.rejected_log_ratios / pairs.rejected_lengths
    return (per_token_gap - 1 / (2 * settings.beta)) ** 2


PREFERENCE_LOSSES: dict[str, Callable[[PairBatch, Any], torch.Tensor]] = {"sigmoid": sigmoid, "ipo": ipo}


def implicit_rewards(pairs: PairBatch, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """β Δ_c and β Δ_r, (n,) each, without gradient: for the logs, whatever the loss (arXiv 2305.18290, section 4)."""
    return beta * pairs.chosen_log_ratios.detach(), beta * pairs.rejected_log_ratios.detach()
