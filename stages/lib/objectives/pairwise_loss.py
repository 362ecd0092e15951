"""The pairwise logistic (Bradley–Terry) loss of a reward model.

    L = -log sigmoid(r_c - r_r - m)

Bradley–Terry makes sigmoid(r_c - r_r) the probability that the chosen reply is preferred (InstructGPT, arXiv
2203.02155, Eq 1); the margin m asks clearly better replies to be further apart (Llama 2, arXiv 2307.09288, Eq 2).
"""

import torch
import torch.nn.functional as F


def pairwise_logistic_losses(
    chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, margins: torch.Tensor
) -> torch.Tensor:
    """One loss a pair, in nats; the caller sums and divides by the pairs of the whole optimizer step.

    Half-precision rewards are raised to float32 before the subtraction: bfloat16 resolves differences around 10 to
    0.06 only. `logsigmoid` is linear where it must be, so differences of ±1e4 keep finite losses and gradients.

    Args:
        chosen_rewards: scores of the chosen replies, (b,).
        rejected_rewards: scores of the rejected replies, (b,).
        margins: m >= 0 in units of the score, 0 where a pair has none, (b,).
    Returns:
        losses (b,), float32 (float64 if the rewards are).
    """
    dtype = torch.promote_types(chosen_rewards.dtype, torch.float32)
    return -F.logsigmoid(chosen_rewards.to(dtype) - rejected_rewards.to(dtype) - margins.to(dtype))
