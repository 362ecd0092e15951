"""Direct preference optimisation: losses on pairs of replies from sums of log-probs under policy and reference.

With the log-ratios D_c = log pi(c) - log ref(c) and D_r likewise, and h = D_c - D_r:

    sigmoid   -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)

              e = 0 is DPO (arXiv 2305.18290, Eq 7); e > 0 is cDPO (Mitchell, "A note on DPO with noisy preferences",
              Eq 3), for labels flipped with probability e: its optimum is sigmoid(beta h) = 1 - e.

    ipo       (D_c / L_c - D_r / L_r - 1 / (2 beta))^2

              IPO (arXiv 2310.12036, Eq 17), with log-ratios averaged over the L tokens of each completion, as its
              authors confirmed to TRL. Implementations that sum give numbers that do not compare with these.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F


class PreferenceLosses(NamedTuple):
    """What one pair contributes; every field has shape (b,)."""

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


def preference_losses(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    *,
    loss_type: Literal["sigmoid", "ipo"],
    beta: float,
    label_smoothing: float = 0.0,
    chosen_lengths: torch.Tensor | None = None,
    rejected_lengths: torch.Tensor | None = None,
) -> PreferenceLosses:
    """One loss a pair; the caller sums and divides by the pairs of the whole optimizer step.

    Args:
        policy_chosen_logps, policy_rejected_logps: log-probs in nats summed over the completion (EOS included), (b,).
        reference_chosen_logps, reference_rejected_logps: the same under the reference, (b,).
        loss_type: "sigmoid" or "ipo", see the formulas above.
        beta: strength of the KL constraint, above 0. For ipo, 1 / (2 beta) is the target of the per-token gap.
        label_smoothing: e, the assumed probability of a flipped label, in [0, 0.5); sigmoid only.
        chosen_lengths, rejected_lengths: completion tokens, at least 1, (b,); needed by ipo, not used by sigmoid.
    Returns:
        losses with gradient; and for the logs, whatever the loss, the implicit rewards beta D_c and beta D_r (summed
        over tokens, without gradient).
    Raises:
        ValueError: an unknown loss type, a value out of range, label smoothing with ipo, ipo without lengths.
    """
    _check(loss_type, beta, label_smoothing, chosen_lengths, rejected_lengths)
    chosen_log_ratios = policy_chosen_logps - reference_chosen_logps
    rejected_log_ratios = policy_rejected_logps - reference_rejected_logps
    if loss_type == "sigmoid":
        scaled_gap = beta * (chosen_log_ratios - rejected_log_ratios)
        losses = -(1 - label_smoothing) * F.logsigmoid(scaled_gap) - label_smoothing * F.logsigmoid(-scaled_gap)
    else:
        per_token_gap = chosen_log_ratios / chosen_lengths - rejected_log_ratios / rejected_lengths
        losses = (per_token_gap - 1 / (2 * beta)) ** 2
    return PreferenceLosses(losses, beta * chosen_log_ratios.detach(), beta * rejected_log_ratios.detach())


def _check(
    loss_type: str,
    beta: float,
    label_smoothing: float,
    chosen_lengths: torch.Tensor | None,
    rejected_lengths: torch.Tensor | None,
) -> None:
    if loss_type not in ("sigmoid", "ipo"):
        raise ValueError(f"loss_type must be sigmoid or ipo, found {loss_type!r}")
    if not beta > 0:
        raise ValueError(f"beta must be above 0, found {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be at least 0 and below 0.5, found {label_smoothing}")
    if loss_type == "ipo":
        if label_smoothing > 0:
            raise ValueError(f"label_smoothing has no meaning for loss_type ipo, found {label_smoothing}: set it to 0")
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError("loss_type ipo averages over tokens: it needs chosen_lengths and rejected_lengths")
