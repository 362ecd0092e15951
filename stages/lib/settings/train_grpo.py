"""Section `train_grpo` of params.yaml: group relative policy optimisation."""

from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import model_validator

from stages.lib.command.params import Seed
from stages.lib.settings.bounds import Count, NewTokens, NotNegative, Positive, Precision, SaveDtype, Temperature, Text
from stages.lib.settings.declaration import block, key
from stages.lib.settings.held_out import HeldOutSettings, held_out
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.reward_reading import RewardSettings
from stages.lib.settings.save_every import SaveEvery, save_every
from stages.lib.settings.truncated import MissingEos, Truncated


class TrainGrpo(RewardSettings):
    """A policy trained on groups of its own responses, without a critic (arXiv 2402.03300)."""

    model: Text = key("models/sft", "folder of the language model that training starts from")
    reference: Text = key("models/sft", "folder of the language model that the KL is measured to")
    reward_model: Text = key("models/rm", "folder of the reward model")
    seed: Seed | None = key(None, "of prompts, sampling and order; null: the common seed")
    iterations: Count = key(10, "rollout phases")
    rollout_batch_size: Count = key(32, "of a rollout phase, over all processes", unit="prompts")
    samples_per_prompt: Annotated[int, Ge(2), Le(2**16)] = key(
        4, "to each prompt, which are compared with each other", unit="responses"
    )
    max_new_tokens: NewTokens = key(64, "of a response", unit="tokens")
    temperature: Temperature = key(1.0, "of sampling, and of every log-prob")
    epochs: Count = key(2, "passes over the rollouts of a phase")
    minibatch_size: Count = key(64, "in an optimizer step, over all processes", unit="rollouts")
    advantage_scale: Literal["group_std", "none"] = key(
        "group_std", "what a reward's difference from its group's mean is divided by", source="arXiv 2402.03300"
    )
    advantage_epsilon: Positive = key(1e-4, "added to group_std", unit="of the reward")
    clip_range: Positive = key(0.2, "of the probability ratio", source="arXiv 1707.06347, Eq 7")
    kl_coef: NotNegative = key(
        0.05, "β of the KL to the reference in the loss (k3)", source="arXiv 2402.03300, Eq 3 and 4"
    )
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
        if self.responses_per_iteration % self.minibatch_size:
            raise ValueError(
                f"rollout_batch_size ({self.rollout_batch_size}) times samples_per_prompt ({self.samples_per_prompt}) "
                f"must be a multiple of minibatch_size ({self.minibatch_size})"
            )
        return self

    @property
    def responses_per_iteration(self) -> int:
        return self.rollout_batch_size * self.samples_per_prompt

    @property
    def updates_per_iteration(self) -> int:
        return self.epochs * (self.responses_per_iteration // self.minibatch_size)

    @property
    def total_updates(self) -> int:
        return self.iterations * self.updates_per_iteration
