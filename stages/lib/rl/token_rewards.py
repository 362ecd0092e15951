"""The reward of each token: a penalty for its KL, and at the last one the score of the whole response."""

import torch


@torch.no_grad()
def token_rewards(
    kl: torch.Tensor | None, scores: torch.Tensor, response_mask: torch.Tensor, kl_coef: float
) -> torch.Tensor:
    """r_t = -beta kl_t + 1[t is the last real token] score (arXiv 1909.08593, Eq 2; arXiv 2203.02155, Eq 2).

    Args:
        kl: per-token KL estimate in nats, (b, t); k1 is the principled one in a reward. None: no penalty.
        scores: the reward of each whole response, already clipped or normalised, (b,).
        response_mask: True on response tokens, (b, t). A row without any gets no score.
        kl_coef: beta.
    Returns:
        rewards (b, t), 0 outside the mask.
    """
    real_tokens_from_here = response_mask.long().flip(-1).cumsum(-1).flip(-1)
    is_last = response_mask & (real_tokens_from_here == 1)
    at_the_end = torch.where(is_last, scores.unsqueeze(-1), 0.0)
    return at_the_end if kl is None else torch.where(response_mask, -kl_coef * kl, 0.0) + at_the_end


@torch.no_grad()
def whitened_rewards(rewards: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(r - mean) / sqrt(variance + 1e-8) + mean, over the response tokens of a phase.

    The mean stays: it is what a response earns by going on for one more token.

    Args:
        rewards: (b, t), of the whole phase, the same in all processes.
        response_mask: True on response tokens, (b, t).
    Returns:
        (b, t), 0 outside the mask, in the type of `rewards`.
    """
    real = rewards[response_mask].double()
    mean = real.mean()
    whitened = (rewards.double() - mean) * torch.rsqrt(real.var(unbiased=False) + 1e-8) + mean
    return torch.where(response_mask, whitened, 0.0).to(rewards.dtype)
