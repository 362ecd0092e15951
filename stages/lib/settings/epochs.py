"""The settings of a stage that passes over a table of rows: how often, in which batches and numbers, what it keeps."""

from dataclasses import dataclass
from typing import Literal

from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.optimizer import OptimizerSettings


@dataclass(frozen=True)
class EpochSettings:
    """What the sections train_sft, train_rm and train_dpo of `params.yaml` share; the file explains each key."""

    epochs: float
    batch_size: int
    precision: Literal["fp32", "bf16"]
    save_dtype: Literal["float32", "bfloat16"]
    eval_every: int
    keep: Literal["best", "last"]
    lora: LoraSettings | None
    optimizer: OptimizerSettings

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise ValueError(f"epochs must be above 0, found {self.epochs}")
        for key in ("batch_size", "eval_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, found {getattr(self, key)}")
