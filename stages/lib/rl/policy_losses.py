"""Losses of a policy on tokens that an earlier policy sampled, as sums over response tokens; a table of them.

Sums, because the caller divides by the token count of the whole minibatch over all micro-batches and processes. The
mask is applied before any exponential: inf * 0 would be NaN. Masked positions may hold anything, NaN included.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch


class PolicyTerms(NamedTuple):
    """Sums over unmasked tokens, each a scalar; only `loss_sum` carries gradient.

    `clipped_sum` counts tokens where the clipped branch is the loss, so that they give no gradient. `approx_kl_sum` is
    k3 of KL(old || current), (rho - 1) - log rho: unbiased for tokens sampled from the old policy, never negative.
    """

    loss_sum: torch.Tensor
    clipped_sum: torch.Tensor
    approx_kl_sum: torch.Tensor


class ClipSettings(Protocol):
    """What `clip_loss` reads of a section of params.yaml."""

    @property
    def clip_range(self) -> float:
        """e of the formula, above 0."""
        ...


def clip_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    settings: ClipSettings,
) -> PolicyTerms:
    """-min(rho A, clip(rho, 1 - e, 1 + e) A), rho = exp(logp - old logp): PPO's (arXiv 1707.06347, Eq 7).

    Args:
        logps: log-probs of the sampled tokens under the current policy, at the sampling temperature, (b, t).
        old_logps: the same under the policy that sampled them, (b, t).
        advantages: whitened or not, (b, t).
        response_mask: True on response tokens, EOS included, (b, t).
        settings: `clip_range` is e.
    """
    log_ratio = torch.where(response_mask, logps - old_logps.detach(), 0.0)
    advantages = torch.where(response_mask, advantages.detach(), 0.0)
    ratio = log_ratio.exp()
    plain = -ratio * advantages
    clipped = -ratio.clamp(1 - settings.clip_range, 1 + settings.clip_range) * advantages
    loss_sum = torch.maximum(plain, clipped).sum()
    with torch.no_grad():
        clipped_sum = (clipped > plain).sum().to(loss_sum.dtype)
        approx_kl_sum = (torch.expm1(log_ratio) - log_ratio).sum()
    return PolicyTerms(loss_sum, clipped_sum, approx_kl_sum)


# (logps, old logps, advantages, response mask, settings) → terms; the settings hold the keys that the loss reads.
POLICY_LOSSES: dict[str, Callable[..., PolicyTerms]] = {"clip": clip_loss}
