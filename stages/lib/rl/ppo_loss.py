"""The losses of PPO's updates in one phase: of the policy, of its critic, and of a policy with a value head."""

from dataclasses import dataclass
from typing import Any

import torch

from stages.lib.rl.kl_control import kl_loss
from stages.lib.rl.learner import Pass, TokenSums
from stages.lib.rl.policy_losses import policy_terms, ratio_sum
from stages.lib.rl.rollouts import Rollouts, values_before
from stages.lib.rl.value_loss import value_loss_terms
from stages.lib.settings.critic import SharedTrunk
from stages.lib.settings.train_ppo import TrainPpo


@dataclass(frozen=True)
class PpoLoss:
    """Sums over the tokens of a pass, each for a `Learner`, which divides them by the tokens of the step.

    Args:
        advantages, returns: of the phase, (b, t).
        kl_coef: of the KL, where it is in the loss.
        entropy_coef: of the entropy that is held up.
    """

    settings: TrainPpo
    advantages: torch.Tensor
    returns: torch.Tensor
    kl_coef: float = 0.0
    entropy_coef: float = 0.0

    def of_policy(self, rollouts: Rollouts, one: Pass) -> TokenSums:
        """L_π with what is added to it, and how far the policy is from the one that sampled."""
        read = one.engine(*one.batch.inputs, one.batch.completion_mask, self.settings.temperature)
        return self._policy_sums(rollouts, one, read)

    def of_values(self, rollouts: Rollouts, one: Pass) -> TokenSums:
        """L_V."""
        return self._value_sums(rollouts, one, values_before(one.engine, one.batch))

    def of_both(self, rollouts: Rollouts, one: Pass) -> TokenSums:
        """L_π + coef L_V of one pass of a body with two heads."""
        return self._both(rollouts, one, warms_up=False)

    def of_head(self, rollouts: Rollouts, one: Pass) -> TokenSums:
        """The same while the value head warms up: coef L_V alone."""
        return self._both(rollouts, one, warms_up=True)

    def _both(self, rollouts: Rollouts, one: Pass, *, warms_up: bool) -> TokenSums:
        critic = self.settings.critic
        assert isinstance(critic, SharedTrunk)
        found = one.engine(*one.batch.inputs, one.batch.completion_mask, self.settings.temperature)
        of_policy = self._policy_sums(rollouts, one, found)
        of_values = self._value_sums(rollouts, one, found.values)
        loss = critic.coef * of_values["loss"] + (0.0 if warms_up else of_policy["loss"])
        return {**of_policy, "loss": loss, **{f"value/{name}": value for name, value in of_values.items()}}

    def _policy_sums(self, rollouts: Rollouts, one: Pass, found: Any) -> TokenSums:
        """Of what a pass of the policy has `found`."""
        settings, rows = self.settings, one.rows
        mask, old_logps = rollouts.response_mask[rows], rollouts.logps[rows]
        logps = one.batch.on_completions(found.logps, mask.shape[1])
        terms = policy_terms(logps, old_logps, self.advantages[rows], mask, settings.loss)
        losses = rollouts.weighted(terms.losses, rows)
        sums = {"loss": losses.sum(), "clipfrac": terms.clipped.sum(), "approxkl": terms.approx_kl.sum()}
        if settings.reuse_sampler_logps:
            sums |= {"first_ratio": ratio_sum(logps, old_logps, mask)}
        if settings.kl.type == "in_loss" and rollouts.reference_logps is not None:
            kl = kl_loss(logps, old_logps, rollouts.reference_logps[rows], mask, settings.kl)
            sums |= {"loss": sums["loss"] + self.kl_coef * rollouts.weighted(kl, rows).sum(), "kl": kl.sum()}
        if self.entropy_coef:
            sums |= {"loss": sums["loss"] - self.entropy_coef * found.entropies.sum()}
        return sums

    def _value_sums(self, rollouts: Rollouts, one: Pass, values: torch.Tensor) -> TokenSums:
        """Of the values that a pass has found before each token, (b, t) of its batch."""
        mask = rollouts.response_mask[one.rows]
        values = one.batch.on_completions(values, mask.shape[1])
        clip_range = self.settings.value_clip_range
        terms = value_loss_terms(values, rollouts.values[one.rows], self.returns[one.rows], mask, clip_range)
        return {"loss": terms.loss_sum, "clipfrac": terms.clipped_sum}
