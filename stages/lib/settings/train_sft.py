"""Section `train_sft` of params.yaml; the file explains each key."""

from dataclasses import dataclass

from stages.lib.settings.epochs import EpochSettings


@dataclass(frozen=True)
class TrainSft(EpochSettings):
    """Section `train_sft` of params.yaml; the file explains each key."""
