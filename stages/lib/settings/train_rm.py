"""Section `train_rm` of params.yaml; the file explains each key."""

from dataclasses import dataclass
from typing import Literal

from stages.lib.settings.epochs import EpochSettings


@dataclass(frozen=True)
class TrainRm(EpochSettings):
    """Section `train_rm` of params.yaml; the file explains each key."""

    init_from: Literal["models/sft", "models/base"]
    use_margin: bool
