"""Losses of a policy on tokens that an earlier policy sampled, token by token; a table of them, and of their means.

A loss is a mean over a whole optimizer step, whatever its micro-batches and processes: each token's loss is weighted by
`token_weights`, and the caller divides the sum by the step's tokens. The mask is applied before any exponential: inf
times 0 would be NaN. Masked positions may hold anything, NaN included.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from stages.lib.rl.log_ratios import ratio_less_one, ratio_of
from stages.lib.settings.policy_loss import CispoLoss, ClippedLoss, SapoLoss, VespoLoss


class PolicyTerms(NamedTuple):
    """Of each token, (b, t), 0 outside the mask; only `losses` carries gradient.

    `clipped` is 1 where a bound on the ratio acts; where the loss is clipped, the token gives no gradient. `approx_kl`
    is k3 of KL(old || current), (rho - 1) - log rho: unbiased for tokens sampled from the old policy, never negative.
    """

    losses: torch.Tensor
    clipped: torch.Tensor
    approx_kl: torch.Tensor


class Sampled(NamedTuple):
    """Tokens of responses, each (b, t), 0 outside the mask: log pi, log(pi / pi_old), A, and the mask itself."""

    logps: torch.Tensor
    log_ratio: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor


Losses = tuple[torch.Tensor, torch.Tensor]  # of each token the loss, and whether a bound acts, (b, t)


def ratio_sum(logps: torch.Tensor, old_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Σ π(y_t) / π_old(y_t) over the masked tokens, without gradient. (b, t) each → a scalar."""
    ratios = ratio_of(torch.where(mask, logps.detach() - old_logps, 0.0))
    return torch.where(mask, ratios, 0.0).sum()


def policy_terms(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    settings: Any,
) -> PolicyTerms:
    """The loss of each token that the settings ask for.

    Args:
        logps: log-probs of the sampled tokens under the current policy, at the sampling temperature, (b, t).
        old_logps: the same under the policy that sampled them, (b, t).
        advantages: whitened or not, (b, t).
        response_mask: True on response tokens, EOS included, (b, t).
        settings: a block of settings/policy_loss.py.
    """
    log_ratio = torch.where(response_mask, logps - old_logps.detach(), 0.0)
    advantages = torch.where(response_mask, advantages.detach(), 0.0)
    sampled = Sampled(torch.where(response_mask, logps, 0.0), log_ratio, advantages, response_mask)
    losses, clipped = POLICY_LOSSES[settings.type](sampled, settings)
    with torch.no_grad():
        approx_kl = ratio_less_one(log_ratio) - log_ratio
        return PolicyTerms(losses, clipped.to(approx_kl.dtype), approx_kl)


def sequence_log_ratio(log_ratio: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of a response's log-ratios at each of its tokens, (b, t): log s_i of GSPO (arXiv 2507.18071, Eq 7)."""
    mean = log_ratio.sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True).clamp_min(1)
    return torch.where(mask, mean, 0.0)


def clipped_ratio(log_ratio: torch.Tensor, advantages: torch.Tensor, settings: ClippedLoss) -> Losses:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A), and with a dual clip, where A < 0, at most -delta A.

    That is PPO's (arXiv 1707.06347, Eq 7; arXiv 1912.09729, Eq 5), DAPO's higher bound (arXiv 2503.14476, Eq 8), and,
    with min(rho, delta) in the first term, INTELLECT-2's two-sided clipping (arXiv 2505.07291, section 4.1), which is
    the dual clip: delta is above 1 + high, so that where A > 0 the second term decides.
    """
    ratio = ratio_of(log_ratio)
    bounded = ratio if settings.dual_clip is None else ratio.clamp(max=settings.dual_clip)
    plain = -bounded * advantages
    clipped = -ratio.clamp(1 - settings.low, 1 + settings.high) * advantages
    beyond = (ratio > bounded) & (advantages < 0)
    return torch.maximum(plain, clipped), (clipped > plain) | beyond


def clip_loss(sampled: Sampled, settings: ClippedLoss) -> Losses:
    """Of each token's ratio."""
    return clipped_ratio(sampled.log_ratio, sampled.advantages, settings)


def sequence_clip_loss(sampled: Sampled, settings: ClippedLoss) -> Losses:
    """Of the response's ratio, whose gradient is that of all its tokens (arXiv 2507.18071, Eq 5 to 7)."""
    return clipped_ratio(sequence_log_ratio(sampled.log_ratio, sampled.mask), sampled.advantages, settings)


def either_clip_loss(sampled: Sampled, settings: Any) -> Losses:
    """As `ratio` says."""
    return (sequence_clip_loss if settings.ratio == "sequence" else clip_loss)(sampled, settings)


def gspo_token_loss(sampled: Sampled, settings: ClippedLoss) -> Losses:
    """Of sg(s_i) pi / sg(pi): the response's ratio, each token's gradient (arXiv 2507.18071, Eq 13 and 14)."""
    of_response = sequence_log_ratio(sampled.log_ratio, sampled.mask).detach()
    return clipped_ratio(of_response + sampled.log_ratio - sampled.log_ratio.detach(), sampled.advantages, settings)


def cispo_loss(sampled: Sampled, settings: CispoLoss) -> Losses:
    """-sg(min(rho, bound)) A log pi (arXiv 2506.13585, Eq 4, without its lower bound, which is not used there)."""
    ratio = ratio_of(sampled.log_ratio.detach())
    weight = ratio.clamp(max=settings.largest_ratio)
    return -weight * sampled.advantages * sampled.logps, ratio > weight


def sapo_loss(sampled: Sampled, settings: SapoLoss) -> Losses:
    """-(4 / tau) sigmoid(tau (rho - 1)) A (arXiv 2511.20347): at rho = 1 its gradient is that of -rho A."""
    advantages = sampled.advantages
    tau = one_of_two(advantages > 0, settings.positive_temperature, settings.negative_temperature, advantages)
    gate = torch.sigmoid(tau * ratio_less_one(sampled.log_ratio)) * 4 / tau
    return -gate * advantages, torch.zeros_like(sampled.mask)


def vespo_loss(sampled: Sampled, settings: VespoLoss) -> Losses:
    """-sg(phi(W)) A log pi with phi = exp(lambda + k log W - lambda W), W = product of a response's rho.

    arXiv 2602.10693. log W is held within [log 1e-8, 20], so that W is finite.
    """
    log_w = sampled.log_ratio.detach().sum(dim=-1, keepdim=True).clamp(math.log(1e-8), 20)
    positive = sampled.advantages >= 0
    power = one_of_two(positive, settings.positive_power, settings.negative_power, log_w)
    decay = one_of_two(positive, settings.positive_decay, settings.negative_decay, log_w)
    weight = torch.exp(decay + power * log_w - decay * log_w.exp())
    return -weight * sampled.advantages * sampled.logps, torch.zeros_like(sampled.mask)


def one_of_two(where: torch.Tensor, one: float, other: float, like: torch.Tensor) -> torch.Tensor:
    """One number where `where` is True, else the other, in the type of `like`: of two numbers torch makes float32."""
    return torch.where(where, one, torch.full_like(where, other, dtype=like.dtype))


POLICY_LOSSES: dict[str, Callable[[Sampled, Any], Losses]] = {
    "clip": clip_loss,
    "grpo": either_clip_loss,
    "dapo": either_clip_loss,
    "bnpo": either_clip_loss,
    "dr_grpo": either_clip_loss,
    "gspo": sequence_clip_loss,
    "gspo_token": gspo_token_loss,
    "luspo": sequence_clip_loss,
    "cispo": cispo_loss,
    "sapo": sapo_loss,
    "vespo": vespo_loss,
}

# What a loss is a mean over: all tokens; responses, each a mean of its tokens; responses of max_new_tokens tokens,
# however many they have; responses, each a sum over its tokens.
MEANS: dict[str, str] = {
    "clip": "tokens",
    "grpo": "responses",
    "dapo": "tokens",
    "bnpo": "tokens",
    "dr_grpo": "full_lengths",
    "gspo": "responses",
    "gspo_token": "responses",
    "luspo": "sums",
    "cispo": "tokens",
    "sapo": "responses",
    "vespo": "tokens",
}


def token_weights(loss: str, lengths: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
    """How much a token of each response counts, (n,), so that the mean over the step's tokens is the loss's own mean.

    With N responses that have tokens, M tokens in all, L_i of a response:

        tokens        1             1/M Σ_i Σ_t l             dapo (arXiv 2503.14476, Eq 8), clip, cispo
        responses     M / (N L_i)   1/N Σ_i 1/L_i Σ_t l       grpo (arXiv 2402.03300, Eq 3), gspo, sapo
        full_lengths  M / (N L)     1/(N L) Σ_i Σ_t l         dr_grpo (arXiv 2503.20783), L = max_new_tokens
        sums          M / N         1/N Σ_i Σ_t l             luspo (arXiv 2602.05261)

    Args:
        loss: its `type`.
        lengths: tokens that count of each response of the optimizer step, (n,); 0: the response is left out.
    """
    responses, tokens = (lengths > 0).sum().clamp_min(1).double(), lengths.sum().double()
    ones = torch.ones_like(lengths, dtype=torch.float64)
    divisors = {
        "tokens": tokens * ones,
        "responses": responses * lengths.clamp_min(1),
        "full_lengths": responses * max_new_tokens * ones,
        "sums": responses * ones,
    }
    return tokens / divisors[MEANS[loss]].clamp_min(1)
