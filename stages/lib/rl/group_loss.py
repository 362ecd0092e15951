"""The loss of one optimizer step of a policy without a critic: what its tokens count, and the KL beside."""

from dataclasses import dataclass

import torch

from stages.lib.rl.kl_control import kl_estimate, kl_loss
from stages.lib.rl.learner import Pass, TokenSums
from stages.lib.rl.policy_losses import policy_terms, ratio_sum, token_weights
from stages.lib.rl.rollouts import Rollouts
from stages.lib.rl.token_masks import highest_entropy, still_on_policy
from stages.lib.settings.kl_penalty import KlInLoss
from stages.lib.settings.train_grpo import TrainGrpo


@dataclass(frozen=True)
class StepLoss:
    """The sums over the tokens of a pass, for a `Learner` that divides them by the tokens of the step.

    Args:
        advantages: (b, t).
        weights: of each response's tokens, (b, 1), those of the step's own denominators.
        counted: True on the tokens whose loss counts, (b, t); the KL is of all.
        kl_coef: of the KL, where it is in the loss.
    """

    settings: TrainGrpo
    advantages: torch.Tensor
    weights: torch.Tensor
    counted: torch.Tensor
    kl_coef: float

    def __call__(self, rollouts: Rollouts, one: Pass) -> TokenSums:
        """L, and how far the policy is from the one that sampled and from the reference."""
        settings, rows = self.settings, one.rows
        mask, old_logps = rollouts.response_mask[rows], rollouts.logps[rows]
        advantages, weights, counted = self.advantages[rows], self.weights[rows], self.counted[rows]
        logps = one.engine(*one.batch.inputs, one.batch.completion_mask, settings.temperature).logps
        logps = one.batch.on_completions(logps, mask.shape[1])  # 0 beyond a response's end, as the reference's: KL 0
        terms = policy_terms(logps, old_logps, advantages, mask, settings.loss)
        sums = {"clipfrac": (terms.clipped * counted).sum(), "approxkl": terms.approx_kl.sum()}
        if settings.reuse_sampler_logps:
            sums["first_ratio"] = ratio_sum(logps, old_logps, mask)
        if settings.off_policy_limit is not None:
            sampled = old_logps if rollouts.engine_logps is None else rollouts.engine_logps[rows]
            counted = counted & still_on_policy(logps, sampled, advantages, mask, settings.off_policy_limit)
            sums["left_out"] = (self.counted[rows] & ~counted).sum()
        loss = (rollouts.weighted(torch.where(counted, terms.losses, 0.0), rows) * weights).sum()
        if rollouts.reference_logps is not None:
            reference_logps = rollouts.reference_logps[rows]
            if isinstance(settings.kl, KlInLoss):
                kl = kl_loss(logps, old_logps, reference_logps, mask, settings.kl)
                loss = loss + self.kl_coef * (rollouts.weighted(kl, rows) * weights).sum()
            else:
                kl = torch.where(mask, kl_estimate(logps.detach(), reference_logps, "k3"), 0.0)
            sums["kl"] = kl.sum()
        return {"loss": loss, **sums}


def step_loss(
    settings: TrainGrpo, kl_coef: float, rollouts: Rollouts, advantages: torch.Tensor, rows: list[int]
) -> StepLoss:
    """The loss of an optimizer step on some rows of the rollouts, whose mask holds the tokens that are in it at all."""
    mask = rollouts.response_mask[rows]
    weights = torch.zeros((len(rollouts.episodes), 1), dtype=advantages.dtype, device=advantages.device)
    of_rows = token_weights(settings.loss.type, mask.sum(dim=-1), settings.max_new_tokens)
    weights[rows, 0] = of_rows.to(weights.dtype)
    counted = rollouts.response_mask
    if settings.top_entropy_share < 1:
        counted = torch.zeros_like(counted)
        counted[rows] = highest_entropy(rollouts.entropies[rows], mask, settings.top_entropy_share)
    return StepLoss(settings, advantages, weights, counted, kl_coef)
