"""Section `train_ppo` of params.yaml: proximal policy optimisation."""

from typing import Literal

from pydantic import model_validator

from stages.lib.command.params import Seed
from stages.lib.settings.bounds import (
    Count,
    NewTokens,
    NotNegative,
    Positive,
    Precision,
    SaveDtype,
    Share,
    Temperature,
    Text,
    WholeNumber,
)
from stages.lib.settings.declaration import block, key
from stages.lib.settings.kl_controller import AdaptiveKl
from stages.lib.settings.kl_penalty import KlInReward, KlPenalty, kl_needs_reference, refuse_unread_reference
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.rewards import MixedRewards
from stages.lib.settings.save_every import SaveEvery, save_every


class TrainPpo(MixedRewards):
    """A policy and a critic, trained on the policy's own responses (arXiv 1707.06347, 2203.02155)."""

    model: Text = key("models/sft", "folder of the language model that training starts from")
    reference: Text = key("models/sft", "folder of the language model that the KL is measured to")
    critic: Text = key(
        "models/rm",
        "folder of the model that the critic starts from: a reward model, or a language model (with a new head)",
    )
    seed: Seed | None = key(None, "of prompts, sampling and order; null: the common seed")
    iterations: Count = key(10, "rollout phases")
    rollout_batch_size: Count = key(
        128, "of a rollout phase, one response each, over all processes; a multiple of minibatch_size", unit="prompts"
    )
    max_new_tokens: NewTokens = key(64, "of a response", unit="tokens")
    temperature: Temperature = key(1.0, "of sampling, and of every log-prob")
    epochs: Count = key(2, "passes over the rollouts of a phase")
    minibatch_size: Count = key(64, "in an optimizer step, over all processes", unit="rollouts")
    gamma: Share = key(1.0, "discount", source="arXiv 1506.02438, Eq 16")
    lam: Share = key(0.95, "λ of the advantage estimator", source="arXiv 1506.02438, Eq 16")
    clip_range: Positive = key(0.2, "of the probability ratio", source="arXiv 1707.06347, Eq 7")
    value_clip_range: Positive = key(
        0.5, "how far a value may move from the rollout's", unit="of the reward", source="arXiv 2005.12729"
    )
    whiten_advantages: bool = key(True, "to mean 0 and variance 1 over the rollouts of a phase")
    kl: KlPenalty = key(block(KlInReward), "where the KL to the reference acts")
    max_kl: Positive | None = key(
        None,
        "stop before the update of a phase whose mean KL to the reference is above this; null: never",
        unit="nats per response",
    )
    max_policy_kl: Positive | None = key(
        None,
        "end a phase's updates before a minibatch on which the policy is further than this from the one that sampled; "
        "null: never",
        unit="nats per token",
    )
    score_clip: Positive | None = key(10.0, "scores are held within ± this, after normalisation; null: no clipping")
    normalise_scores: bool = key(False, "to running mean 0 and standard deviation 1")
    missing_eos_penalty: NotNegative = key(
        2.0, "taken off the score of a response that does not end", unit="of the reward"
    )
    critic_warmup_iterations: WholeNumber = key(0, "first phases in which only the critic learns; below iterations")
    precision: Precision = key("fp32", "of weights and activations; the masters are float32 either way")
    save_dtype: SaveDtype = key("float32", "of the saved weights")
    save_every: SaveEvery | None = save_every()
    lora: LoraSettings | None = key(
        None,
        "null: every weight is trained; else a block: policy and critic get adapters, and their frozen bases also "
        "serve as reference and reward model where these are the same models",
    )
    policy_optimizer: OptimizerSettings = key(
        block(OptimizerSettings, learning_rate=2e-4, schedule="linear", warmup_ratio=0.02), "of the policy"
    )
    critic_optimizer: OptimizerSettings = key(
        block(OptimizerSettings, learning_rate=5e-4, schedule="linear", warmup_ratio=0.02),
        "of the critic; its ema_decay is null, since the critic is not published",
    )

    @model_validator(mode="after")
    def _check(self) -> "TrainPpo":
        if self.rollout_batch_size % self.minibatch_size:
            raise ValueError(
                f"rollout_batch_size ({self.rollout_batch_size}) must be a multiple of minibatch_size "
                f"({self.minibatch_size})"
            )
        if self.critic_warmup_iterations >= self.iterations:
            raise ValueError("critic_warmup_iterations must be below iterations, or the policy never learns")
        if self.critic_optimizer.ema_decay is not None:
            raise ValueError("critic_optimizer.ema_decay must be null: the critic is not published")
        return self

    @model_validator(mode="after")
    def _check_kl(self) -> "TrainPpo":
        refuse_unread_reference(self.kl, self.model, self.reference)
        if self.max_kl is not None and not self.reads_reference:
            raise ValueError("max_kl limits the KL to a reference, and kl has none; set null")
        control = self.kl.controller if isinstance(self.kl, KlInReward) else None
        if isinstance(control, AdaptiveKl) and self.rollout_batch_size >= 5 * control.horizon:
            raise ValueError(
                f"kl.controller.horizon ({control.horizon}) must be more than a fifth of rollout_batch_size "
                f"({self.rollout_batch_size})"
            )
        return self

    @property
    def reads_reference(self) -> bool:
        """Whether a reference model is loaded."""
        return kl_needs_reference(self.kl)

    @property
    def reported_kl(self) -> Literal["k1", "k2", "k3"]:
        """The estimator of the KL that is reported, limited and steered: that in the reward, or k1."""
        return self.kl.estimator if isinstance(self.kl, KlInReward) else "k1"

    @property
    def updates_per_iteration(self) -> int:
        return self.epochs * (self.rollout_batch_size // self.minibatch_size)
