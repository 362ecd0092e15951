"""The clipped loss of PPO's critic, as a sum over response tokens, and how good a critic is.

A sum, because the caller divides by the token count of the whole minibatch over all micro-batches and processes. Masked
positions may hold anything, NaN included.
"""

from typing import NamedTuple

import torch


class ValueTerms(NamedTuple):
    """Sums over unmasked tokens, each a scalar; only `loss_sum` carries gradient.

    `clipped_sum` counts tokens where the clipped value is the loss.
    """

    loss_sum: torch.Tensor
    clipped_sum: torch.Tensor


def value_loss_terms(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    response_mask: torch.Tensor,
    clip_range: float,
) -> ValueTerms:
    """1/2 max((V - G)^2, (V_clip - G)^2), V_clip = V held within old V ± e (arXiv 2005.12729; arXiv 2403.17031).

    Args:
        values: of the current critic, (b, t).
        old_values: of the critic when the tokens were sampled, (b, t).
        returns: G, the targets, (b, t).
        response_mask: True on response tokens, (b, t).
        clip_range: e, above 0, in units of the value.
    """
    values = torch.where(response_mask, values, 0.0)
    old_values = torch.where(response_mask, old_values.detach(), 0.0)
    returns = torch.where(response_mask, returns.detach(), 0.0)
    # Clamping V itself, not V - old V, keeps V exact inside the range: no rounding is counted as clipping.
    clipped_values = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    plain = (values - returns) ** 2
    clipped = (clipped_values - returns) ** 2
    loss_sum = 0.5 * torch.maximum(plain, clipped).sum()
    with torch.no_grad():
        clipped_sum = (clipped > plain).sum().to(loss_sum.dtype)
    return ValueTerms(loss_sum, clipped_sum)


@torch.no_grad()
def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(G - V) / Var(G) over unmasked tokens: 1 is a perfect critic, 0 as good as a constant, below 0 worse.

    Args:
        values, returns: (b, t), of the whole batch.
        mask: True on response tokens, (b, t).
    Returns:
        0.0 where the returns do not vary (or fewer than two tokens count), since then nothing can be explained.
    """
    targets = returns[mask].double()
    if targets.numel() < 2:
        return 0.0
    total = targets.var(unbiased=False)
    if total == 0:
        return 0.0
    return float(1 - (targets - values[mask].double()).var(unbiased=False) / total)
