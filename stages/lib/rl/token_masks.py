"""Which tokens of a phase's responses the policy's loss counts."""

import math

import torch

from stages.lib.rl.rollouts import Rollouts


def without_truncated(rollouts: Rollouts) -> Rollouts:
    """With no token counted of a response that did not end (DAPO's overlong filtering, arXiv 2503.14476, section 3.4).

    It is as though these responses were not in the optimizer step: neither its loss nor its denominators know them.
    """
    return rollouts._replace(response_mask=rollouts.response_mask & rollouts.ended[:, None])


# In nats: a prompt's samples often begin alike, and the last digits of equal entropies depend on how passes are cut.
ALIKE = 1e-5


def highest_entropy(entropies: torch.Tensor, mask: torch.Tensor, share: float) -> torch.Tensor:
    """True on the tokens whose entropy is not below the (1 - share)-quantile of all of them (arXiv 2506.01939, Eq 5).

    Those that are below it by rounding alone (`ALIKE`) count as equal to it.

    Args:
        entropies: of a whole optimizer step's tokens, over all its micro-batches and processes, (b, t).
        mask: True on response tokens, (b, t).
    Returns:
        (b, t), False outside the mask.
    """
    found = entropies[mask]
    if not found.numel():
        return mask
    place = math.ceil((1 - share) * (found.numel() - 1))  # 0-based: the quantile's next value, so as many are kept
    return mask & (entropies >= found.sort().values[place] - ALIKE)


def still_on_policy(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, limit: float
) -> torch.Tensor:
    """False on tokens of negative advantage in a response that the policy has left behind (arXiv 2512.02556, Eq 9).

    That is one with mean(log pi_old - log pi) over its tokens above `limit`, in nats. All tensors are (b, t).
    """
    fallen = torch.where(mask, old_logps - logps.detach(), 0.0).sum(dim=-1) / mask.sum(dim=-1).clamp_min(1)
    return ~((fallen > limit)[:, None] & (advantages < 0))
