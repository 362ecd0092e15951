"""Section `train_grpo` of params.yaml: group relative policy optimisation."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import model_validator

from stages.lib.command.params import Seed
from stages.lib.settings.advantages import Advantages, GroupRelative, needs_groups
from stages.lib.settings.bounds import Count, Positive, Precision, SaveDtype, Text
from stages.lib.settings.declaration import block, key
from stages.lib.settings.dynamic_sampling import DynamicSampling
from stages.lib.settings.held_out import HeldOutSettings, held_out
from stages.lib.settings.kl_penalty import (
    KlInLoss,
    KlInReward,
    KlPenalty,
    kl_needs_reference,
    refuse_short_horizon,
    refuse_unread_reference,
)
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.policy_loss import DapoLoss, PolicyLoss
from stages.lib.settings.rewards import MixedRewards
from stages.lib.settings.sampling import SamplingSettings
from stages.lib.settings.save_every import SaveEvery, save_every
from stages.lib.settings.truncated import MissingEos, Truncated


class TrainGrpo(SamplingSettings, MixedRewards):
    """A policy trained on groups of its own responses, without a critic (arXiv 2402.03300)."""

    model: Text = key("models/sft", "folder of the language model that training starts from")
    reference: Text = key("models/sft", "folder of the language model that the KL is measured to")
    tokens: Text = key(
        "data/tokens",
        "folder of the token tables whose train prompts are asked: data/tokens, or data/pass_rates/<name>/kept, or its "
        "control",
    )
    seed: Seed | None = key(None, "of prompts, sampling and order; null: the common seed")
    iterations: Count = key(10, "rollout phases")
    rollout_batch_size: Count = key(32, "of a rollout phase, over all processes", unit="prompts")
    samples_per_prompt: Annotated[int, Ge(1), Le(2**16)] = key(
        4, "to each prompt, which are compared with each other; 1 with advantages of type reinforce", unit="responses"
    )
    dynamic_sampling: DynamicSampling | None = key(
        None, "a block: groups that teach nothing are replaced by those of further prompts; null: they stay"
    )
    epochs: Count = key(2, "passes over the rollouts of a phase")
    minibatch_size: Count = key(64, "in an optimizer step, over all processes", unit="rollouts")
    advantages: Advantages = key(block(GroupRelative), "how rewards become advantages")
    loss: PolicyLoss = key(block(DapoLoss, high=0.2), "of the policy, a mean over an optimizer step")
    mask_truncated: bool = key(
        False,
        "leave responses that do not end out of the loss and its denominators; they count in their group's advantages",
        source="overlong filtering, arXiv 2503.14476, section 3.4",
    )
    top_entropy_share: Annotated[float, Gt(0), Le(1)] = key(
        1.0,
        "of a minibatch's tokens whose loss counts: those with the highest entropy when they were sampled, such as "
        "0.2; the KL is of all",
        source="arXiv 2506.01939, Eq 5",
    )
    off_policy_limit: Positive | None = key(
        None,
        "leave out the loss of a response with a negative advantage whose tokens' log-probs have fallen by more than "
        "this in the mean, such as 0.5; null: none",
        unit="nats per token",
        source="DeepSeek-V3.2, arXiv 2512.02556, Eq 9",
    )
    kl: KlPenalty = key(block(KlInLoss, estimator="k3"), "where the KL to the reference acts")
    truncated: Truncated = key(
        block(MissingEos), "what becomes of the score of a response that does not end within max_new_tokens"
    )
    precision: Precision = key("fp32", "of weights and activations; the masters are float32 either way")
    save_dtype: SaveDtype = key("float32", "of the saved weights")
    held_out: HeldOutSettings | None = held_out()
    save_every: SaveEvery | None = save_every()
    lora: LoraSettings | None = key(
        None,
        "null: every weight is trained; else a block: the frozen base is also the reference, if that is the same model",
    )
    optimizer: OptimizerSettings = key(
        block(OptimizerSettings, learning_rate=2e-4, schedule="linear", warmup_ratio=0.02),
        "AdamW, its schedule and clipping",
    )

    @model_validator(mode="after")
    def _check(self) -> "TrainGrpo":
        if needs_groups(self.advantages) and self.samples_per_prompt < 2:
            raise ValueError(
                f"advantages of type {self.advantages.type} compare a prompt's samples: samples_per_prompt must be at "
                f"least 2, found {self.samples_per_prompt}"
            )
        if self.responses_per_iteration % self.minibatch_size:
            raise ValueError(
                f"rollout_batch_size ({self.rollout_batch_size}) times samples_per_prompt ({self.samples_per_prompt}) "
                f"must be a multiple of minibatch_size ({self.minibatch_size})"
            )
        if self.dynamic_sampling and self.samples_per_prompt < 2:
            raise ValueError(
                "dynamic_sampling keeps groups whose rewards differ: samples_per_prompt must be at least 2"
            )
        if self.advantages.type == "max_rl" and isinstance(self.kl, KlInReward):
            raise ValueError("advantages of type max_rl need rewards of at least 0: kl.type must not be in_reward")
        if self.advantages.type == "gdpo" and isinstance(self.kl, KlInReward) and self.reads_reference:
            raise ValueError(
                "advantages of type gdpo standardise each part of the reward, a KL too, whatever its coefficient: "
                "kl.type must not be in_reward"
            )
        return self

    @model_validator(mode="after")
    def _check_kl(self) -> "TrainGrpo":
        refuse_unread_reference(self.kl, self.model, self.reference)
        refuse_short_horizon(self.kl, self.responses_per_iteration)
        return self

    @property
    def reads_reference(self) -> bool:
        """Whether a reference model is loaded."""
        return kl_needs_reference(self.kl)

    @property
    def reported_kl(self) -> Literal["k1", "k2", "k3"]:
        """The estimator of the KL that is reported and steered: that in the reward, or k1."""
        return self.kl.estimator if isinstance(self.kl, KlInReward) else "k1"

    @property
    def responses_per_iteration(self) -> int:
        return self.rollout_batch_size * self.samples_per_prompt

    @property
    def updates_per_iteration(self) -> int:
        return self.epochs * (self.responses_per_iteration // self.minibatch_size)

    @property
    def total_updates(self) -> int:
        return self.iterations * self.updates_per_iteration
