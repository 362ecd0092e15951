"""Advantages: generalised advantage estimates (GAE), and rewards relative to those of a group.

`gae` and `group_relative` are `Advantages`, of the rollouts of a phase; what they are made of stands below them. Time t
runs over response tokens, EOS included. Positions outside the mask (padding) are skipped as though they were not there,
whatever they hold, NaN included. Nothing here carries gradient: advantages and returns are targets.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch

from stages.lib.rl.rollouts import Rollouts

# From rollouts and settings, (advantages, returns), each (b, t), 0 outside the mask; returns are None without a critic.
Advantages = Callable[[Rollouts, Any], tuple[torch.Tensor, torch.Tensor | None]]


class GaeSettings(Protocol):
    """What `gae` reads of a section of params.yaml."""

    @property
    def gamma(self) -> float: ...

    @property
    def lam(self) -> float: ...

    @property
    def whiten_advantages(self) -> bool: ...


class GroupSettings(Protocol):
    """What `group_relative` reads of a section of params.yaml."""

    @property
    def advantage_scale(self) -> Literal["group_std", "none"]: ...

    @property
    def advantage_epsilon(self) -> float: ...


@torch.no_grad()
def gae(rollouts: Rollouts, settings: GaeSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE of the tokens' rewards under the critic's values, whitened over all rollouts if asked for.

    Returns:
        (advantages, returns), each (b, t); the returns are never whitened.
    """
    mask = rollouts.response_mask
    advantages, returns = generalized_advantages(rollouts.rewards, rollouts.values, mask, settings.gamma, settings.lam)
    if settings.whiten_advantages:
        total, squares, count = masked_moments(advantages, mask)
        mean = total / count
        advantages = whiten(advantages, mask, mean, squares / count - mean * mean)
    return advantages, returns


@torch.no_grad()
def group_relative(rollouts: Rollouts, settings: GroupSettings) -> tuple[torch.Tensor, None]:
    """The advantage of each response within its prompt's samples, at each of its tokens, (b, t); there are no returns.

    No critic and no discount: what counts is the sum of a response's rewards, and its tokens share the advantage.
    """
    scale, epsilon = settings.advantage_scale, settings.advantage_epsilon
    advantages = group_relative_advantages(rollouts.groups(rollouts.rewards.sum(dim=-1)), scale=scale, epsilon=epsilon)
    advantages = advantages.reshape(-1, 1)
    return torch.where(rollouts.response_mask, advantages, 0.0), None


@torch.no_grad()
def group_relative_advantages(
    rewards: torch.Tensor, *, scale: Literal["group_std", "none"], epsilon: float
) -> torch.Tensor:
    """A_i = (R_i - mean) / (s + epsilon) within each group (arXiv 2402.03300, section 4.1.2).

    s is the group's standard deviation, dividing by its size less 1, or 1 with scale "none" (arXiv 2503.20783), which
    does not favour prompts whose responses hardly differ. A group without variance teaches nothing: A is 0 exactly.

    Args:
        rewards: (groups, samples of each), at least 2 samples.
        epsilon: above 0, in units of the reward; it bounds what becomes of differences that are next to none.
    Returns:
        (groups, samples), in the type of `rewards`.
    """
    values = rewards.double()
    centred = values - values.mean(dim=1, keepdim=True)
    if scale == "group_std":
        centred = centred / (values.std(dim=1, keepdim=True) + epsilon)
    return torch.where(without_variance(rewards)[:, None], 0.0, centred).to(rewards.dtype)


def without_variance(rewards: torch.Tensor) -> torch.Tensor:
    """True for each group whose rewards are all the same. (groups, samples) → (groups,)."""
    return (rewards == rewards[:, :1]).all(dim=1)


def group_summary(rollouts: Rollouts) -> dict[str, float]:
    """The mean reward; of a group's responses the share that differ; the share of groups that teach nothing."""
    rewards = rollouts.groups(rollouts.rewards.sum(dim=-1))
    size = rewards.shape[1]
    groups = [rollouts.responses[start : start + size] for start in range(0, len(rollouts.episodes), size)]
    distinct = sum(len({tuple(ids) for ids in group}) for group in groups)
    return {
        "objective/rewards": float(rewards.mean()),
        "group/distinct": distinct / len(rollouts.episodes),
        "group/without_variance": float(without_variance(rewards).float().mean()),
    }


@torch.no_grad()
def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, response_mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE (arXiv 1506.02438, Eq 16; arXiv 1707.06347, Eq 11-12), computed from the last token back.

        delta_t = r_t + gamma V_{t+1} - V_t        with V = 0 after the last token: the episode ends there
        A_t     = delta_t + gamma lam A_{t+1}
        G_t     = A_t + V_t                        the target of the value function, before any whitening

    Args:
        rewards: (b, t).
        values: V of the critic when the tokens were sampled, (b, t).
        response_mask: True on response tokens, (b, t).
        gamma: discount in [0, 1].
        lam: lambda in [0, 1]; 1 gives reward-to-go minus V, 0 one-step differences.
    Returns:
        (advantages, returns), each (b, t), 0 outside the mask, in the wider type of rewards and values.
    """
    values = values.to(torch.promote_types(values.dtype, rewards.dtype))
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        real = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # At a masked position both carries pass through unchanged, so it is as if it did not exist.
        next_advantage = torch.where(real, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(real, values[:, t], next_value)
        advantages[:, t] = torch.where(real, next_advantage, 0.0)
    return advantages, torch.where(response_mask, advantages + values, 0.0)


@torch.no_grad()
def masked_moments(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum, sum of squares, count) of the unmasked values, as float64 scalars, which add up over parts of a batch.

    mean = sum / count and variance = sum of squares / count - mean^2. In float32 that difference would cancel; in
    float64 it keeps about 8 digits for a mean of 1e4 standard deviations.

    Args:
        values: (b, t).
        mask: True on what counts, (b, t).
    """
    kept = torch.where(mask, values, 0.0).double()
    return kept.sum(), (kept * kept).sum(), mask.sum().double()


@torch.no_grad()
def whiten(
    advantages: torch.Tensor, mask: torch.Tensor, mean: float | torch.Tensor, variance: float | torch.Tensor
) -> torch.Tensor:
    """(A - mean) / sqrt(variance + 1e-8) on the mask, 0 elsewhere.

    Args:
        advantages: (b, t).
        mask: True on response tokens, (b, t).
        mean, variance: of the unmasked advantages of the whole phase (population variance, dividing by the count), or
            the result would depend on how it is cut up. A variance below 0 is rounding and counts as 0.
    Returns:
        whitened advantages (b, t), in the type of `advantages`.
    """
    scale = torch.rsqrt(torch.as_tensor(variance, dtype=torch.float64, device=advantages.device).clamp_min(0.0) + 1e-8)
    centred = advantages.double() - torch.as_tensor(mean, dtype=torch.float64, device=advantages.device)
    return torch.where(mask, centred * scale, 0.0).to(advantages.dtype)
