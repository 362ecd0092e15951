"""The score s(Δ) that an f-divergence gives a log-ratio Δ = log π(y|x) − log π_ref(y|x) (f-DPO, arXiv 2309.16240).

s(Δ) = f′(e^Δ) − f′(1), so that a policy that is its reference has score 0; for the reverse KL it is Δ.

Exponents are held at `EXPONENT_LIMIT`, since e^89 is infinite in float32. Beyond it a score stays as it is, and its
gradient is 0: such a reply, e^80 times less likely than under the reference, is no longer pulled back by it.
"""

import math

import torch
import torch.nn.functional as F

from stages.lib.settings.divergence import AlphaDivergence, AnyDivergence, ForwardKl, JensenShannon

EXPONENT_LIMIT = 80.0


def scores(log_ratios: torch.Tensor, divergence: AnyDivergence, limit: float = EXPONENT_LIMIT) -> torch.Tensor:
    """s(Δ), of the shape of Δ.

    reverse_kl: Δ;   forward_kl: 1 − e^−Δ;   js: log σ(Δ) + log 2;   alpha: (1 − e^−αΔ) / α
    """
    if isinstance(divergence, JensenShannon):
        return F.logsigmoid(log_ratios) + math.log(2)
    rate = exponent_rate(divergence)
    return -torch.expm1((-rate * log_ratios).clamp(max=limit)) / rate if rate else log_ratios


def exponent_rate(divergence: AnyDivergence) -> float:
    """The a of the e^−aΔ in a score; 0 where there is none."""
    if isinstance(divergence, AlphaDivergence):
        return divergence.alpha
    return 1.0 if isinstance(divergence, ForwardKl) else 0.0
