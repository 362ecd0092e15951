"""The settings of one optimizer: AdamW, learning-rate schedule, gradient clipping."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OptimizerSettings:
    """One `optimizer:` block of `params.yaml`; the file explains each key."""

    learning_rate: float
    schedule: Literal["cosine", "linear", "constant"]
    warmup_ratio: float
    min_learning_rate_ratio: float
    weight_decay: float
    beta1: float
    beta2: float
    max_grad_norm: float
    ema_decay: float | None

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, found {self.learning_rate}")
        for key in ("warmup_ratio", "min_learning_rate_ratio"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} must be between 0 and 1, found {getattr(self, key)}")
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 0 and below 1, found {getattr(self, key)}")
        if self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm must be above 0, found {self.max_grad_norm}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be above 0 and below 1, or null, found {self.ema_decay}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, found {self.weight_decay}")
