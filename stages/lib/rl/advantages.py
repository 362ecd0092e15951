"""Advantages: generalised advantage estimates (GAE), and rewards relative to those of other responses.

`gae` and the entries of `ADVANTAGES` are of the rollouts of a phase; what they are made of stands below them. Time t
runs over response tokens, EOS included. Positions outside the mask (padding) are skipped as though they were not there,
whatever they hold, NaN included. Nothing here carries gradient: advantages and returns are targets.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch

from stages.lib.command.errors import StageError
from stages.lib.rl.rollouts import Rollouts
from stages.lib.settings.advantages import Gdpo, GroupRelative, LeaveOneOut, MaxRl, Reinforce, ReinforceBaseline

NO_WEIGHTS: Mapping[str, float] = {}


class GaeSettings(Protocol):
    """What `gae` reads of a section of params.yaml."""

    @property
    def gamma(self) -> float: ...

    @property
    def lam(self) -> float: ...

    @property
    def whiten_advantages(self) -> bool: ...


@torch.no_grad()
def gae(rollouts: Rollouts, settings: GaeSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE of the tokens' rewards under the critic's values, whitened over all rollouts if asked for.

    Returns:
        (advantages, returns), each (b, t); the returns are never whitened.
    """
    mask = rollouts.response_mask
    advantages, returns = generalized_advantages(rollouts.rewards, rollouts.values, mask, settings.gamma, settings.lam)
    return whitened(advantages, mask) if settings.whiten_advantages else advantages, returns


@torch.no_grad()
def group_relative(rollouts: Rollouts, settings: GroupRelative) -> torch.Tensor:
    """GRPO's: the reward of a response within its prompt's samples, at each of its tokens, (b, t)."""
    rewards = rollouts.groups(totals(rollouts))
    return at_tokens(group_relative_advantages(rewards, scale=settings.scale, epsilon=settings.epsilon), rollouts)


@torch.no_grad()
def leave_one_out(rollouts: Rollouts, _settings: LeaveOneOut) -> torch.Tensor:
    """RLOO's (arXiv 2402.14740, Eq 8), at each token, (b, t): R_i - mean of the others = G / (G - 1) (R_i - mean)."""
    rewards = rollouts.groups(totals(rollouts))
    size = rewards.shape[1]
    centred = group_relative_advantages(rewards, scale="none", epsilon=0.0)
    return at_tokens(centred * size / (size - 1), rollouts)


@torch.no_grad()
def reinforce(rollouts: Rollouts, settings: Reinforce) -> torch.Tensor:
    """REINFORCE++'s (arXiv 2501.03262), (b, t): rewards to come, less their mean over the tokens of the phase."""
    return of_the_phase(rewards_to_come(rollouts, settings.gamma), rollouts.response_mask, settings.scale)


@torch.no_grad()
def reinforce_baseline(rollouts: Rollouts, settings: ReinforceBaseline) -> torch.Tensor:
    """REINFORCE++-baseline's (arXiv 2501.03262), (b, t): `reinforce` of rewards less their group's mean.

    The group's mean is that of all rewards of a response, a KL in the reward included: taken off the scores alone, it
    would leave the KL to press on the length of responses.
    """
    to_come = rewards_to_come(rollouts, settings.gamma)
    of_group = rollouts.groups(to_come[:, 0]).mean(dim=1, keepdim=True).expand(-1, rollouts.group_size).reshape(-1, 1)
    return of_the_phase(to_come - of_group, rollouts.response_mask, settings.scale)


@torch.no_grad()
def gdpo(rollouts: Rollouts, settings: Gdpo, weights: Mapping[str, float] = NO_WEIGHTS) -> torch.Tensor:
    """GDPO's, at each token, (b, t), of the parts of the rollouts' rewards, each by its weight.

    What is taken off the score of a response that does not end is no part: it counts as it is, in deviations of a
    reward, or its size would not matter.
    """
    besides = rollouts.groups(totals(rollouts) - rollouts.scores)
    parts = {name: rollouts.groups(part) for name, part in rollouts.parts.items()}
    if not parts:
        parts, weights = {"score": rollouts.groups(rollouts.scores)}, {"score": 1.0}
    return at_tokens(decoupled_advantages(parts, weights, besides, epsilon=settings.epsilon), rollouts)


@torch.no_grad()
def max_rl(rollouts: Rollouts, _settings: MaxRl) -> torch.Tensor:
    """MaxRL's (arXiv 2602.02710), at each token, (b, t): (R_i - mean) / mean within a group; 0 where all rewards are 0.

    Raises:
        StageError: a reward below 0, of which no likelihood can be made.
    """
    rewards = totals(rollouts)
    if bool((rewards < 0).any()):
        place = int((rewards < 0).nonzero()[0])
        raise StageError(
            f"row {rollouts.episodes[place].prompt.row} of the prompts: the reward is {float(rewards[place]):.4g}; "
            "advantages of type max_rl need rewards of at least 0, such as 1 for a right answer and 0 for a wrong one"
        )
    groups = rollouts.groups(rewards)
    mean = groups.double().mean(dim=1, keepdim=True)
    centred = group_relative_advantages(groups, scale="none", epsilon=0.0)
    return at_tokens(torch.where(mean > 0, centred / mean, 0.0).to(groups.dtype), rollouts)


# Rollouts and the block of settings/advantages.py → (b, t), 0 outside the mask.
ADVANTAGES: dict[str, Callable[[Rollouts, Any], torch.Tensor]] = {
    "group_relative": group_relative,
    "leave_one_out": leave_one_out,
    "reinforce": reinforce,
    "reinforce_baseline": reinforce_baseline,
    "gdpo": gdpo,
    "max_rl": max_rl,
}


def advantages_of(rollouts: Rollouts, settings: Any, weights: Mapping[str, float] = NO_WEIGHTS) -> torch.Tensor:
    """The advantages that a block of settings/advantages.py asks for, (b, t); `weights` are those of the rewards."""
    if isinstance(settings, Gdpo):
        return gdpo(rollouts, settings, weights)
    return ADVANTAGES[settings.type](rollouts, settings)


def totals(rollouts: Rollouts) -> torch.Tensor:
    """The sum of a response's rewards, (b,)."""
    return rollouts.rewards.sum(dim=-1)


def at_tokens(advantages: torch.Tensor, rollouts: Rollouts) -> torch.Tensor:
    """Of responses, (groups, samples), at each of their tokens, (b, t)."""
    return torch.where(rollouts.response_mask, advantages.reshape(-1, 1), 0.0)


def rewards_to_come(rollouts: Rollouts, gamma: float) -> torch.Tensor:
    """Of each token its reward and those after it, discounted, (b, t)."""
    nothing = torch.zeros_like(rollouts.rewards)
    return generalized_advantages(rollouts.rewards, nothing, rollouts.response_mask, gamma, lam=1.0)[0]


def of_the_phase(advantages: torch.Tensor, mask: torch.Tensor, scale: Literal["batch_std", "none"]) -> torch.Tensor:
    """Less their mean over all tokens, and divided by their standard deviation or not, (b, t)."""
    if scale == "batch_std":
        return whitened(advantages, mask)
    total, _, count = masked_moments(advantages, mask)
    return torch.where(mask, advantages - total / count, 0.0).to(advantages.dtype)


@torch.no_grad()
def group_relative_advantages(
    rewards: torch.Tensor, *, scale: Literal["group_std", "batch_std", "none"], epsilon: float
) -> torch.Tensor:
    """A_i = (R_i - mean) / (s + epsilon) within each group (arXiv 2402.03300, section 4.1.2).

    s is the group's standard deviation, dividing by its size less 1; that of all rewards (arXiv 2508.08221); or 1 with
    scale "none" (arXiv 2503.20783), which does not favour prompts whose responses hardly differ. A group without
    variance teaches nothing: A is 0 exactly.

    Args:
        rewards: (groups, samples of each), at least 2 samples.
        epsilon: above 0, in units of the reward; it bounds what becomes of differences that are next to none.
    Returns:
        (groups, samples), in the type of `rewards`.
    """
    values = rewards.double()
    centred = values - values.mean(dim=1, keepdim=True)
    if scale != "none":
        deviation = values.std(dim=1, keepdim=True) if scale == "group_std" else values.std()
        centred = centred / (deviation + epsilon)
    return torch.where(without_variance(rewards)[:, None], 0.0, centred).to(rewards.dtype)


@torch.no_grad()
def decoupled_advantages(
    parts: Mapping[str, torch.Tensor], weights: Mapping[str, float], besides: torch.Tensor, *, epsilon: float
) -> torch.Tensor:
    """Each reward standardised in its group, then their weighted sum over the phase (GDPO, arXiv 2601.05242).

        Z_ik = (r_ik - mean_k) / (s_k + epsilon)               within the group, of reward k
        A_i  = (Σ_k w_k Z_ik + b_i - mean b) / (S + epsilon)   S the standard deviation of these sums over the phase

    The mean of the sums is 0, since that of each group is.

    Args:
        parts: of each reward, by name, (groups, samples); NaN where it does not apply, which counts for nothing.
        besides: b, what is added to the sum without being standardised, (groups, samples).
    Returns:
        (groups, samples), in the type of the first part.
    """
    sums = torch.stack([weights[name] * standardised_in_groups(part, epsilon) for name, part in parts.items()]).sum(0)
    sums = sums + group_relative_advantages(besides.double(), scale="none", epsilon=0.0)
    deviation = sums.std() if sums.numel() > 1 else 0.0
    return (sums / (deviation + epsilon)).to(next(iter(parts.values())).dtype)


def standardised_in_groups(part: torch.Tensor, epsilon: float) -> torch.Tensor:
    """(r - mean) / (s + epsilon) over those of a group that are no NaN, in float64; 0 for NaN, and without variance."""
    values, found = part.double().nan_to_num(), ~part.isnan()
    count = found.sum(dim=1, keepdim=True)
    mean = values.sum(dim=1, keepdim=True) / count.clamp_min(1)
    centred = torch.where(found, values - mean, 0.0)
    deviation = (centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    least, most = (torch.where(found, part.double(), edge) for edge in (torch.inf, -torch.inf))
    alike = least.min(dim=1, keepdim=True).values >= most.max(dim=1, keepdim=True).values
    return torch.where(alike, 0.0, centred / (deviation + epsilon))


def without_variance(rewards: torch.Tensor) -> torch.Tensor:
    """True for each group whose rewards are all the same. (groups, samples) → (groups,)."""
    return (rewards == rewards[:, :1]).all(dim=1)


def group_summary(rollouts: Rollouts) -> dict[str, float]:
    """The mean reward; of a group's responses the share that differ; the share of groups that teach nothing."""
    rewards = rollouts.groups(totals(rollouts))
    size = rollouts.group_size
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


def whitened(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`whiten` by the moments of these advantages themselves, those of a whole phase, (b, t)."""
    total, squares, count = masked_moments(advantages, mask)
    mean = total / count
    return whiten(advantages, mask, mean, squares / count - mean * mean)


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
