"""Section `train_ppo` of params.yaml: proximal policy optimisation."""

import os
from pathlib import PurePath
from typing import Literal

from pydantic import model_validator

from stages.lib.settings.bounds import (
    Count,
    Positive,
    Share,
    Text,
    WholeNumber,
)
from stages.lib.settings.critic import Critic, SeparateCritic, SharedTrunk
from stages.lib.settings.declaration import block, key
from stages.lib.settings.entropy_bonus import EntropyBonus, NoEntropyBonus
from stages.lib.settings.kl_controller import FixedKl
from stages.lib.settings.kl_penalty import KlInReward, KlPenalty
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.policy_loss import ClipLoss
from stages.lib.settings.policy_training import PolicyTraining
from stages.lib.settings.ptx import PtxSettings
from stages.lib.settings.reference_reset import ReferenceReset

PROMPTS = "data/tokens/train/prompts.arrow"


class TrainPpo(PolicyTraining):
    """A policy and a critic, trained on the policy's own responses (arXiv 1707.06347, 2203.02155)."""

    critic: Critic = key(block(SeparateCritic), "what foresees the returns")
    iterations: Count = key(11, "rollout phases; in the default run 10 in which the policy learns")
    gamma: Share = key(
        1.0, "discount; 1: a response is short, and its score comes at its end", source="arXiv 1506.02438, Eq 16"
    )
    lam: Share = key(
        0.95,
        "λ of the advantage estimator: 1 trusts what came out, 0 the critic",
        source="arXiv 1506.02438, Eq 16; the value of arXiv 2403.17031",
    )
    loss: ClipLoss = key(block(ClipLoss), "of the policy, a mean over the tokens of an optimizer step")
    value_clip_range: Positive = key(
        0.5,
        "how far a value may move from the rollout's in a phase: half the deviation of the default run's scores",
        unit="of the reward",
        source="arXiv 2005.12729",
    )
    whiten_rewards: bool = key(
        False, "the tokens' rewards to variance 1 over a phase, their mean as it is", source="arXiv 2403.17031"
    )
    whiten_advantages: bool = key(True, "to mean 0 and variance 1 over the rollouts of a phase")
    reference_reset: ReferenceReset | None = key(
        None, "null: the reference stays as it is; else a block: from time to time it becomes the policy"
    )
    entropy_bonus: EntropyBonus = key(block(NoEntropyBonus), "how much the policy's entropy counts in its loss")
    ptx: PtxSettings | None = key(
        None, "null: rollouts alone; else a block: supervised rows are mixed into the policy's updates (PPO-ptx)"
    )
    ptx_tokens: Text = key(
        PROMPTS,
        f"what ptx reads: train/sft.arrow of a folder of tokens; with ptx: null, {PROMPTS}, which is read anyway",
    )
    kl: KlPenalty = key(block(KlInReward, controller=block(FixedKl, coef=0.4)), "where the KL to the reference acts")
    max_kl: Positive | None = key(
        None,
        "training ends where the mean KL of a phase to the reference is above this, with the weights of the last phase "
        "within it; what the last phase makes, and what keep: best compares, is measured by held_out. A second copy of "
        "weights and moments is held on the CPU, and in checkpoints; null: never",
        unit="nats per response",
    )
    max_policy_kl: Positive | None = key(
        None,
        "after an update that takes the policy further than this from the one that sampled, measured on the "
        "minibatch that comes next, the update is taken back and the policy rests until the next phase; a second copy "
        "of its weights and moments is held on the CPU; null: never",
        unit="nats per token",
    )
    score_clip: Positive | None = key(
        10.0,
        "scores are held within ± this, after normalisation and before all else: what is this far out is no "
        "preference; null: no clipping",
    )
    normalise_scores: Literal["start", "running"] | None = key(
        None,
        "to mean 0 and standard deviation 1, null: not; start: by the scores of the first phase, whose responses are "
        "the start's own, such as SFT's | running: by all scores so far",
        source="start: arXiv 1909.08593",
    )
    critic_warmup_iterations: WholeNumber = key(
        1,
        "first phases in which only the critic learns; below iterations. One that starts from a reward model at first "
        "foresees returns worse than a constant would (value/explained_variance below 0)",
    )
    lora: LoraSettings | None = key(
        None,
        "null: every weight is trained; else a block: policy and critic get adapters, and their frozen bases also "
        "serve as reference and reward model where these are the same models",
    )
    policy_optimizer: OptimizerSettings = key(
        block(OptimizerSettings, learning_rate=4e-4, schedule="linear", warmup_ratio=0.1, epsilon=1e-5),
        "of the policy. warmup_ratio: in the default run its first phase, which else takes it several times as far as "
        "later ones (policy/approxkl), since Adam's first steps are all of full length. epsilon: that of arXiv "
        "2403.17031, which damps weights with hardly any gradient",
    )

    @model_validator(mode="after")
    def _check(self) -> "TrainPpo":
        if self.reuse_sampler_logps and self.critic.type == "shared_trunk":
            raise ValueError(
                "reuse_sampler_logps must be false with a critic of type shared_trunk: the pass that it saves also "
                "gives the values"
            )
        held_out = self.held_out
        compares = held_out is not None and (held_out.keep == "best" or held_out.early_stopping is not None)
        best_by = held_out.best_by.metric if held_out and compares else ""
        if self.reference_reset is not None and best_by in ("objective/kl", "objective/rlhf_reward"):
            raise ValueError(
                f"held_out.best_by.metric {best_by} compares KLs to several references, since reference_reset is set: "
                "take objective/rewards"
            )
        if self.critic_warmup_iterations >= self.iterations:
            raise ValueError("critic_warmup_iterations must be below iterations, or the policy never learns")
        return self

    @model_validator(mode="after")
    def _check_critic(self) -> "TrainPpo":
        if not isinstance(self.critic, SharedTrunk):
            return self
        if os.path.normpath(self.critic.path) != os.path.normpath(self.model):
            raise ValueError(f"critic.path: a shared trunk is that of model ({self.model}), found {self.critic.path}")
        if self.critic_warmup_iterations and self.policy_optimizer.weight_decay:
            raise ValueError(
                "critic_warmup_iterations: while the head of a shared_trunk warms up, policy_optimizer.weight_decay "
                "would move the policy; set one of them to 0"
            )
        return self

    @model_validator(mode="after")
    def _check_kl(self) -> "TrainPpo":
        if self.max_kl is not None and not self.reads_reference:
            raise ValueError("max_kl limits the KL to a reference, and kl has none; set null")
        if self.max_kl is not None and self.asynchronous:
            raise ValueError(
                "max_kl steps back by the KL of a phase's responses, and with asynchronous: true these are of weights "
                "a phase older than those it would keep; set one of them back"
            )
        if self.reference_reset is not None and not self.reads_reference:
            raise ValueError("reference_reset: kl has no reference; set null")
        if self.reference_reset is not None and os.path.normpath(self.reference) != os.path.normpath(self.model):
            raise ValueError("reference_reset: the reference becomes the policy, and so must start as it: as model")
        if self.reference_reset is not None and self.lora is not None:
            raise ValueError("reference_reset moves whole models, and lora trains adapters; set one of them to null")
        return self

    @model_validator(mode="after")
    def _check_copies(self) -> "TrainPpo":
        if self.ptx is None and self.ptx_tokens != PROMPTS:
            raise ValueError(
                f"ptx_tokens: with ptx: null nothing reads {self.ptx_tokens}, for which DVC would wait; write {PROMPTS}"
            )
        if self.ptx is not None and PurePath(self.ptx_tokens).parts[-2:] != ("train", "sft.arrow"):
            raise ValueError(f"ptx_tokens: expected <folder of tokens>/train/sft.arrow, found {self.ptx_tokens}")
        for name in ("max_kl", "max_policy_kl"):
            if getattr(self, name) is not None and self.policy_optimizer.moments != "float32":
                raise ValueError(
                    f"{name} takes steps back, which needs policy_optimizer.moments: float32, found "
                    f"{self.policy_optimizer.moments}; set {name}: null"
                )
        return self
