"""Section `train_dpo` of params.yaml; the file explains each key."""

from dataclasses import dataclass
from typing import Literal

from stages.lib.settings.epochs import EpochSettings


@dataclass(frozen=True)
class TrainDpo(EpochSettings):
    """Section `train_dpo` of params.yaml; the file explains each key."""

    loss_type: Literal["sigmoid", "ipo"]
    beta: float
    label_smoothing: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0:
            raise ValueError(f"beta must be above 0, found {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be at least 0 and below 0.5, found {self.label_smoothing}")
        if self.loss_type == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing has no meaning with loss_type: ipo; set it to 0")
