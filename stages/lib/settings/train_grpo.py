"""Section `train_grpo` of params.yaml: group relative policy optimisation."""

from typing import Annotated

from annotated_types import Ge, Gt, Le
from pydantic import model_validator

from stages.lib.settings.advantages import Advantages, GroupRelative, needs_groups
from stages.lib.settings.bounds import Count, Positive, Text
from stages.lib.settings.declaration import block, key
from stages.lib.settings.dynamic_sampling import DynamicSampling
from stages.lib.settings.kl_penalty import KlInLoss, KlInReward, KlPenalty
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.policy_loss import DapoLoss, PolicyLoss
from stages.lib.settings.policy_training import PolicyTraining


class TrainGrpo(PolicyTraining):
    """A policy trained on groups of its own responses, without a critic (arXiv 2402.03300)."""

    tokens: Text = key(
        "data/tokens",
        "folder of the token tables whose train prompts are asked: data/tokens, or data/pass_rates/<name>/kept, or its "
        "control",
    )
    rollout_batch_size: Count = key(32, "of a rollout phase, over all processes", unit="prompts")
    samples_per_prompt: Annotated[int, Ge(1), Le(2**16)] = key(
        4, "to each prompt, which are compared with each other; 1 with advantages of type reinforce", unit="responses"
    )
    dynamic_sampling: DynamicSampling | None = key(
        None, "a block: groups that teach nothing are replaced by those of further prompts; null: they stay"
    )
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
    score_clip: Positive | None = key(
        None,
        "scores are held within ± this, before they are compared within their group; null: no clipping",
        unit="of the reward",
    )
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
        if self.advantages.type == "gdpo" and self.score_clip is not None:
            raise ValueError(
                "score_clip holds the sum of rewards, and advantages of type gdpo standardise each: set null"
            )
        if self.advantages.type == "gdpo" and self.truncated.type != "missing_eos":
            raise ValueError(
                f"truncated of type {self.truncated.type} changes the sum of rewards, and advantages of type gdpo "
                "standardise each: take missing_eos"
            )
        return self
