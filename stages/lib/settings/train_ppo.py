"""Section `train_ppo` of params.yaml; the file explains each key."""

from dataclasses import dataclass
from typing import Literal

from stages.lib.command.params import Seed
from stages.lib.settings.bounds import Count, NewTokens, NotNegative, Positive, Share, Temperature, WholeNumber
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.optimizer import OptimizerSettings


@dataclass(frozen=True)
class TrainPpo:
    """Section `train_ppo` of params.yaml; the file explains each key."""

    seed: Seed | None
    iterations: Count
    rollout_batch_size: Count
    max_new_tokens: NewTokens
    temperature: Temperature
    epochs: Count
    minibatch_size: Count
    gamma: Share
    lam: Share
    clip_range: Positive
    value_clip_range: Positive
    whiten_advantages: bool
    kl_estimator: Literal["k1", "k2", "k3"]
    kl_controller: Literal["fixed", "adaptive"]
    kl_coef: NotNegative
    kl_target: Positive | None
    kl_horizon: Positive | None
    max_kl: Positive | None
    max_policy_kl: Positive | None
    score_clip: Positive | None
    normalise_scores: bool
    missing_eos_penalty: NotNegative
    critic_warmup_iterations: WholeNumber
    precision: Literal["fp32", "bf16"]
    save_dtype: Literal["float32", "bfloat16"]
    lora: LoraSettings | None
    policy_optimizer: OptimizerSettings
    critic_optimizer: OptimizerSettings

    def __post_init__(self) -> None:
        if self.rollout_batch_size % self.minibatch_size:
            raise ValueError(
                f"rollout_batch_size ({self.rollout_batch_size}) must be a multiple of minibatch_size "
                f"({self.minibatch_size})"
            )
        if self.critic_warmup_iterations >= self.iterations:
            raise ValueError("critic_warmup_iterations must be below iterations, or the policy never learns")
        if self.critic_optimizer.ema_decay is not None:
            raise ValueError("critic_optimizer.ema_decay must be null: the critic is not published")
        self._check_kl_controller()

    def _check_kl_controller(self) -> None:
        adaptive = self.kl_controller == "adaptive"
        if (self.kl_target is not None, self.kl_horizon is not None) != (adaptive, adaptive):
            raise ValueError("kl_target and kl_horizon belong to kl_controller: adaptive, which needs both")
        if adaptive and self.kl_coef == 0:
            raise ValueError("kl_coef must be above 0 with kl_controller: adaptive, which multiplies it")
        if adaptive and self.rollout_batch_size >= 5 * self.kl_horizon:
            raise ValueError("kl_horizon must be more than a fifth of rollout_batch_size")

    @property
    def updates_per_iteration(self) -> int:
        return self.epochs * (self.rollout_batch_size // self.minibatch_size)
