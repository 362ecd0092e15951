"""The settings of a stage that passes over a table of rows: how often, in which batches and numbers, what it keeps."""

from dataclasses import dataclass
from typing import Literal

from stages.lib.settings.bounds import Count, Positive
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.optimizer import OptimizerSettings


@dataclass(frozen=True)
class EpochSettings:
    """What the sections train_sft, train_rm and train_dpo of `params.yaml` share; the file explains each key."""

    epochs: Positive
    batch_size: Count
    precision: Literal["fp32", "bf16"]
    save_dtype: Literal["float32", "bfloat16"]
    eval_every: Count
    keep: Literal["best", "last"]
    lora: LoraSettings | None
    optimizer: OptimizerSettings
