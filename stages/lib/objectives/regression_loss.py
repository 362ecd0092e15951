"""The squared error of a reward model's scores.

    L = (r - s)²

s is the score that the data gives a reply, such as a rating; r = E[s] has the least mean. HelpSteer2's reward models
are trained so, on several scores at once (arXiv 2406.08673).
"""

import torch


def squared_errors(rewards: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """One loss a reply; the caller sums and divides by the replies of the whole optimizer step.

    Args:
        rewards: r, raised to float32 if they are narrower, (b,).
        scores: s, (b,).
    Returns:
        losses (b,), float32 (float64 if the rewards are).
    """
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    return (rewards.to(dtype) - scores.to(dtype)).square()
