"""The settings of one optimizer: AdamW, learning-rate schedule, gradient clipping."""

from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import model_validator

from stages.lib.settings.bounds import BetweenZeroAndOne, Decay, NotNegative, Positive, Share
from stages.lib.settings.declaration import Settings, key


class OptimizerSettings(Settings):
    """AdamW with a linear warm-up, a schedule, gradient clipping and, if wanted, an average of the weights."""

    moments: Literal["float32", "8bit", "paged", "paged_8bit"] = key(
        "float32",
        "how they are held; 8bit: in a quarter of the memory (arXiv 2110.02861) | paged: moved to the CPU's memory "
        "where a GPU's is full; all but float32 by bitsandbytes, on plain torch",
    )
    learning_rate: Positive = key(1.5e-3, "at its peak")
    schedule: Literal["cosine", "linear", "constant"] = key(
        "cosine", "course of the learning rate after the linear warm-up", source="cosine: arXiv 1608.03983, Eq 5"
    )
    warmup_ratio: Share = key(0.05, "length of the warm-up", unit="share of all optimizer steps")
    min_learning_rate_ratio: Share = key(
        0.1, "learning rate of the last step; without effect with constant", unit="share of the peak"
    )
    weight_decay: NotNegative = key(0.0, "decoupled, on matrices only", source="arXiv 1711.05101")
    beta1: Decay = key(0.9, "decay of the gradient's first moment", source="arXiv 1412.6980")
    beta2: Decay = key(0.95, "decay of its second moment", source="arXiv 1412.6980")
    epsilon: Annotated[float, Ge(1e-12), Le(1)] = key(
        1e-8,
        "added to the root of the second moment: what is far below it moves no weight",
        unit="of the gradient",
        source="arXiv 1412.6980",
    )
    max_grad_norm: Positive = key(1.0, "the gradient is scaled down to this norm", unit="global L2 norm")
    ema_decay: BetweenZeroAndOne | None = key(
        None,
        "of an exponential moving average of the weights over the steps, such as 0.99, which is then what is "
        "evaluated and published; null: none",
        source="arXiv 1806.04498",
    )

    @model_validator(mode="after")
    def _check(self) -> "OptimizerSettings":
        if self.ema_decay is not None and self.moments != "float32":
            raise ValueError(f"ema_decay needs moments: float32, found {self.moments}; set ema_decay: null")
        return self
