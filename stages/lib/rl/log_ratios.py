"""Exponentials of log-ratios that stay finite, with a finite gradient, however far two policies are apart.

In float32 e^x overflows at 89 nats, and a clipped loss would then have the gradient 0 · inf. Beyond `LARGEST` each goes
on as its tangent there, so that it still rises; nothing changes below.
"""

import math

import torch

LARGEST = 20.0  # nats: a ratio of 5e8, beyond all that a bound on ratios lets through


def ratio_of(log_ratio: torch.Tensor) -> torch.Tensor:
    """e^x, in the shape and type of `log_ratio`."""
    return log_ratio.clamp(max=LARGEST).exp() * (1 + (log_ratio - LARGEST).clamp(min=0))


def ratio_less_one(log_ratio: torch.Tensor) -> torch.Tensor:
    """e^x - 1, exact for small x, in the shape and type of `log_ratio`."""
    return torch.expm1(log_ratio.clamp(max=LARGEST)) + math.exp(LARGEST) * (log_ratio - LARGEST).clamp(min=0)
