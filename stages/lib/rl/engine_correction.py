"""Importance weights for responses that a sampler drew from a distribution q of its own, and how far that is from ours.

    w_t = π_old(y_t) / q(y_t)          of a token
    w   = Π_t w_t                      of a response

π_old is the policy before the phase's updates as the trainer computes it, q what the sampler says it drew from. With w
of responses an expectation over q is one over π_old; w_t alone leaves the earlier tokens where q led them, a bias, and
varies less. Products are sums of logarithms, and bounds act before any exponential.
"""

import math

import torch

from stages.lib.command.errors import StageError
from stages.lib.rl.rollouts import Rollouts
from stages.lib.settings.engine_correction import EngineCorrection, NoEngineCorrection
from stages.lib.settings.sampling import SamplingSettings

DIFFERENCE_COLUMNS = ("engine/logp_difference", "engine/logp_difference_max", "engine/kl")
STALENESS = "engine/staleness"
WEIGHT_COLUMNS = ("engine/weight", "engine/bounded", "engine/effective_share")
LARGEST_EXPONENT = 20.0  # of a metric, which one token is not to make infinite


def engine_columns(settings: SamplingSettings) -> tuple[str, ...]:
    """What `engine_corrected` adds to the curve."""
    added = {STALENESS: settings.asynchronous}
    added |= dict.fromkeys(DIFFERENCE_COLUMNS, settings.keeps_engine_logps)
    added |= dict.fromkeys(WEIGHT_COLUMNS, settings.engine_correction.type != "none")
    return tuple(name for name, is_there in added.items() if is_there)


def engine_corrected(rollouts: Rollouts, settings: EngineCorrection) -> tuple[Rollouts, dict[str, float]]:
    """The rollouts with the weights of their tokens' losses, and metrics; as they are where the sampler kept nothing.

        engine/staleness            updates of the policy since the weights that sampled
        engine/logp_difference      mean of |log π_old − log q| over tokens, in nats; …_max: the largest
        engine/kl                   k3 of KL(q ‖ π_old), its mean over tokens, in nats
        engine/weight               mean of the weights of tokens (or responses), after the bounds; without them about 1
        engine/bounded              share of the weights that a bound has changed
        engine/effective_share      (Σ w)² / (n Σ w²): what share of n equally weighted tokens they are worth

    Raises:
        StageError: a log-prob is not finite.
    """
    found = {} if rollouts.staleness is None else {STALENESS: float(rollouts.staleness)}
    if rollouts.engine_logps is None:
        return rollouts, found
    mask = rollouts.response_mask
    difference = torch.where(mask, rollouts.logps.double() - rollouts.engine_logps.double(), 0.0)
    if not bool(difference.isfinite().all()):
        raise StageError("log-probs of sampled tokens are not finite, those of the sampler or those of the policy")
    of_tokens = difference[mask]
    kl = torch.expm1(of_tokens.clamp(max=LARGEST_EXPONENT)) - of_tokens
    values = [float(value) for value in (of_tokens.abs().mean(), of_tokens.abs().max(), kl.mean())]
    found |= dict(zip(DIFFERENCE_COLUMNS, values, strict=True))
    if isinstance(settings, NoEngineCorrection):
        return rollouts, found
    by_token = settings.type.startswith("token")
    log_weights = difference if by_token else difference.sum(dim=-1, keepdim=True)
    weights = bounded_weights(log_weights, settings)
    changed = weights != log_weights.exp()
    of_each, changed = (weights[mask], changed[mask]) if by_token else (weights[:, 0], changed[:, 0])
    effective = of_each.sum().square() / (len(of_each) * of_each.square().sum()).clamp_min(1e-300)
    values = [float(value) for value in (of_each.mean(), changed.double().mean(), effective)]
    found |= dict(zip(WEIGHT_COLUMNS, values, strict=True))
    return rollouts._replace(engine_weights=torch.where(mask, weights, 0.0).to(rollouts.logps.dtype)), found


def bounded_weights(log_weights: torch.Tensor, settings: EngineCorrection) -> torch.Tensor:
    """Weights from their logarithms, of any shape: lowered or raised to the bounds, or 0 beyond them."""
    assert not isinstance(settings, NoEngineCorrection)
    low, high = math.log(settings.lower) if settings.lower else -math.inf, math.log(settings.upper)
    weights = log_weights.clamp(low, high).exp()
    if settings.type.endswith("masked"):
        return torch.where((log_weights < low) | (log_weights > high), 0.0, weights)
    return weights
