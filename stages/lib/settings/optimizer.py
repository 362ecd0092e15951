"""The settings of one optimizer: AdamW, learning-rate schedule, gradient clipping."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Lt

from stages.lib.settings.bounds import Decay, NotNegative, Positive, Share


@dataclass(frozen=True)
class OptimizerSettings:
    """One `optimizer:` block of `params.yaml`; the file explains each key."""

    learning_rate: Positive
    schedule: Literal["cosine", "linear", "constant"]
    warmup_ratio: Share
    min_learning_rate_ratio: Share
    weight_decay: NotNegative
    beta1: Decay
    beta2: Decay
    max_grad_norm: Positive
    ema_decay: Annotated[float, Gt(0), Lt(1)] | None
