"""Section `train_ppo` of params.yaml; the file explains each key."""

from dataclasses import dataclass
from typing import Literal

from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.optimizer import OptimizerSettings


@dataclass(frozen=True)
class TrainPpo:
    """Section `train_ppo` of params.yaml; the file explains each key."""

    iterations: int
    rollout_batch_size: int
    max_new_tokens: int
    temperature: float
    epochs: int
    minibatch_size: int
    gamma: float
    lam: float
    clip_range: float
    value_clip_range: float
    whiten_advantages: bool
    kl_estimator: Literal["k1", "k2", "k3"]
    kl_controller: Literal["fixed", "adaptive"]
    kl_coef: float
    kl_target: float | None
    kl_horizon: float | None
    max_kl: float | None
    max_policy_kl: float | None
    score_clip: float | None
    normalise_scores: bool
    missing_eos_penalty: float
    critic_warmup_iterations: int
    precision: Literal["fp32", "bf16"]
    save_dtype: Literal["float32", "bfloat16"]
    lora: LoraSettings | None
    policy_optimizer: OptimizerSettings
    critic_optimizer: OptimizerSettings

    def __post_init__(self) -> None:
        for key in ("iterations", "rollout_batch_size", "max_new_tokens", "epochs", "minibatch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, found {getattr(self, key)}")
        for key in ("temperature", "clip_range", "value_clip_range", "max_kl", "max_policy_kl", "score_clip"):
            if getattr(self, key) is not None and getattr(self, key) <= 0:
                raise ValueError(f"{key} must be above 0, found {getattr(self, key)}")
        for key in ("kl_coef", "missing_eos_penalty", "critic_warmup_iterations"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must not be negative, found {getattr(self, key)}")
        for key in ("gamma", "lam"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} must be between 0 and 1, found {getattr(self, key)}")
        if self.rollout_batch_size % self.minibatch_size:
            raise ValueError(
                f"rollout_batch_size {self.rollout_batch_size} is no multiple of minibatch_size {self.minibatch_size}"
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
        if adaptive and (self.kl_coef <= 0 or self.kl_target <= 0 or self.kl_horizon <= 0):
            raise ValueError("kl_coef, kl_target and kl_horizon must be above 0 with kl_controller: adaptive")
        if adaptive and self.rollout_batch_size >= 5 * self.kl_horizon:
            raise ValueError("kl_horizon must be more than a fifth of rollout_batch_size")

    @property
    def updates_per_iteration(self) -> int:
        return self.epochs * (self.rollout_batch_size // self.minibatch_size)
