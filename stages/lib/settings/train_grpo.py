"""Section `train_grpo` of params.yaml; the file explains each key."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from stages.lib.command.params import Seed
from stages.lib.settings.bounds import Count, NewTokens, NotNegative, Positive, Temperature
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.optimizer import OptimizerSettings


@dataclass(frozen=True)
class TrainGrpo:
    """Section `train_grpo` of params.yaml; the file explains each key."""

    seed: Seed | None
    iterations: Count
    rollout_batch_size: Count
    samples_per_prompt: Annotated[int, Ge(2), Le(2**16)]
    max_new_tokens: NewTokens
    temperature: Temperature
    epochs: Count
    minibatch_size: Count
    advantage_scale: Literal["group_std", "none"]
    advantage_epsilon: Positive
    clip_range: Positive
    kl_coef: NotNegative
    missing_eos_penalty: NotNegative
    precision: Literal["fp32", "bf16"]
    save_dtype: Literal["float32", "bfloat16"]
    lora: LoraSettings | None
    optimizer: OptimizerSettings

    def __post_init__(self) -> None:
        if self.responses_per_iteration % self.minibatch_size:
            raise ValueError(
                f"rollout_batch_size ({self.rollout_batch_size}) times samples_per_prompt ({self.samples_per_prompt}) "
                f"must be a multiple of minibatch_size ({self.minibatch_size})"
            )

    @property
    def responses_per_iteration(self) -> int:
        return self.rollout_batch_size * self.samples_per_prompt

    @property
    def updates_per_iteration(self) -> int:
        return self.epochs * (self.responses_per_iteration // self.minibatch_size)
