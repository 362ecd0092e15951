"""Section `train_dpo` of params.yaml; the file explains each key."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from stages.lib.command.params import Seed
from stages.lib.settings.bounds import Positive
from stages.lib.settings.epochs import EpochSettings


@dataclass(frozen=True)
class TrainDpo(EpochSettings):
    """Section `train_dpo` of params.yaml; the file explains each key."""

    seed: Seed | None
    loss_type: Literal["sigmoid", "ipo"]
    beta: Positive
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)]

    def __post_init__(self) -> None:
        if self.loss_type == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing has no meaning with loss_type: ipo; set it to 0")
