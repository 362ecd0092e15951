"""The pairwise logistic (Bradley–Terry) loss of a reward model.

    L = -(1 - e) log sigmoid(g) - e log sigmoid(-g) + c (r_c + r_r)²,   g = r_c - r_r - m

Bradley–Terry makes sigmoid(r_c - r_r) the probability that the chosen reply is preferred (InstructGPT, arXiv
2203.02155, Eq 1). The margin m asks clearly better replies to be further apart (Llama 2, arXiv 2307.09288, Eq 2). Of
the labels a share e is taken to be wrong (as cDPO has it: E. Mitchell, A note on DPO with noisy preferences, Eq 3): the
loss then has its minimum at g = log((1 - e) / e). Pairs say nothing of a constant added to all scores; the last term
holds it near 0 (arXiv 2312.09244, Eq 2).
"""

import torch
import torch.nn.functional as F


def pairwise_logistic_losses(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    margins: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    centering_coefficient: float = 0.0,
) -> torch.Tensor:
    """One loss a pair, in nats; the caller sums and divides by the pairs of the whole optimizer step.

    Half-precision rewards are raised to float32 before the subtraction: bfloat16 resolves differences around 10 to
    0.06 only. `logsigmoid` is linear where it must be, so differences of ±1e4 keep finite losses and gradients.

    Args:
        chosen_rewards: scores of the chosen replies, (b,).
        rejected_rewards: scores of the rejected replies, (b,).
        margins: m >= 0 in units of the score, 0 where a pair has none, (b,).
        label_smoothing: e, in [0, 1/2).
        centering_coefficient: c, at least 0.
    Returns:
        losses (b,), float32 (float64 if the rewards are).
    """
    dtype = torch.promote_types(chosen_rewards.dtype, torch.float32)
    chosen, rejected = chosen_rewards.to(dtype), rejected_rewards.to(dtype)
    gaps = chosen - rejected - margins.to(dtype)
    losses = -(1 - label_smoothing) * F.logsigmoid(gaps) - label_smoothing * F.logsigmoid(-gaps)
    return losses + centering_coefficient * (chosen + rejected).square()
