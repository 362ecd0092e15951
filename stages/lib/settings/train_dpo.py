"""Section `train_dpo` of params.yaml: direct preference optimisation."""

from typing import Self

from pydantic import model_validator

from stages.lib.command.params import Seed
from stages.lib.settings.bounds import Count, Positive, Text
from stages.lib.settings.declaration import block, key
from stages.lib.settings.epochs import EpochSettings
from stages.lib.settings.lora import quantization_of_base
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.preference_loss import PreferenceLoss, SigmoidLoss, needs_reference
from stages.lib.settings.reference_sync import ReferenceSync


class TrainDpo(EpochSettings):
    """A policy trained on pairs, without a reward model."""

    reference: Text = key(
        "data/ref_logprobs/sft",
        "folder of the reference's log-probs, as ref_logprobs writes it; with a loss that reads none, that of model",
    )
    epochs: Positive = key(0.3, "passes over the rows, may be a fraction")
    batch_size: Count = key(32, "in an optimizer step, over all processes", unit="pairs")
    optimizer: OptimizerSettings = key(block(OptimizerSettings, learning_rate=2e-4), "AdamW, its schedule and clipping")
    seed: Seed | None = key(None, "of the order of rows and of adapters; null: the common seed")
    loss: PreferenceLoss = key(block(SigmoidLoss, beta=0.2), "the loss of a pair, and what it needs")

    reference_sync: ReferenceSync | None = key(
        None, "null: the reference stays as it is; else a block: it follows the policy (TR-DPO)"
    )

    @model_validator(mode="after")
    def _check_sync(self) -> Self:
        if self.reference_sync is not None and not needs_reference(self.loss):
            raise ValueError(f"reference_sync: the loss {self.loss.type} reads no reference here; set null")
        if self.reference_sync is not None and quantization_of_base(self.lora) is not None:
            raise ValueError("reference_sync moves whole weights; set it or lora.base_quantization to null")
        return self

    @property
    def reads_reference(self) -> bool:
        """Whether `reference` is a folder of log-probs, rather than the model's own."""
        return needs_reference(self.loss)
