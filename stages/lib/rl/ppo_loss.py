"""The clipped policy and value losses of PPO, as sums over response tokens.

Sums, because the caller divides by the token count of the whole minibatch over all micro-batches and processes. The
mask is applied before any exponential: inf * 0 would be NaN. Masked positions may hold anything, NaN included.
"""

from typing import NamedTuple

import torch


class PolicyTerms(NamedTuple):
    """Sums over unmasked tokens, each a scalar; only `loss_sum` carries gradient.

    `clipped_sum` counts tokens where the clipped branch is the loss, so that they give no gradient. `approx_kl_sum` is
    k3 of KL(old || current), (rho - 1) - log rho: unbiased for tokens sampled from the old policy, never negative.
    """

    loss_sum: torch.Tensor
    clipped_sum: torch.Tensor
    approx_kl_sum: torch.Tensor
    count: torch.Tensor


class ValueTerms(NamedTuple):
    """Sums over unmasked tokens, each a scalar; only `loss_sum` carries gradient.

    `clipped_sum` counts tokens where the clipped value is the loss.
    """

    loss_sum: torch.Tensor
    clipped_sum: torch.Tensor
    count: torch.Tensor


def policy_loss_terms(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    clip_range: float,
) -> PolicyTerms:
    """-min(rho A, clip(rho, 1 - e, 1 + e) A), rho = exp(logp - old logp) (arXiv 1707.06347, Eq 7).

    Args:
        logps: log-probs of the sampled tokens under the current policy, at the sampling temperature, (b, t).
        old_logps: the same under the policy that sampled them, (b, t).
        advantages: whitened or not, (b, t).
        response_mask: True on response tokens, EOS included, (b, t).
        clip_range: e, above 0.
    """
    log_ratio = torch.where(response_mask, logps - old_logps.detach(), 0.0)
    advantages = torch.where(response_mask, advantages.detach(), 0.0)
    ratio = log_ratio.exp()
    plain = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    loss_sum = torch.maximum(plain, clipped).sum()
    with torch.no_grad():
        clipped_sum = (clipped > plain).sum().to(loss_sum.dtype)
        approx_kl_sum = (torch.expm1(log_ratio) - log_ratio).sum()
        count = response_mask.sum().to(loss_sum.dtype)
    return PolicyTerms(loss_sum, clipped_sum, approx_kl_sum, count)


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
        count = response_mask.sum().to(loss_sum.dtype)
    return ValueTerms(loss_sum, clipped_sum, count)


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
