"""Section `train_rm` of params.yaml: the reward model."""

from typing import Literal

from pydantic import model_validator

from stages.lib.settings.bounds import Count, Text
from stages.lib.settings.declaration import block, key
from stages.lib.settings.epochs import EpochSettings
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.reward_loss import PairwiseLoss, RegressionLoss, RewardLoss


class TrainRm(EpochSettings):
    """A reward model, trained on pairs (arXiv 2203.02155, Eq 1) or on scores."""

    model: Text = key(
        "models/sft",
        "folder that it starts from: a language model (its body, with a new head) or a reward model (with its head)",
    )
    batch_size: Count = key(32, "in an optimizer step, over all processes", unit="pairs or replies")
    eval_every: Count = key(125, "between two evaluations; the last step is always evaluated", unit="optimizer steps")
    keep: Literal["best", "last"] = key("best", "weights to publish; best: those of the best evaluation")
    optimizer: OptimizerSettings = key(
        block(OptimizerSettings, learning_rate=5e-4, weight_decay=0.01), "AdamW, its schedule and clipping"
    )
    kind: Literal["preference", "unpaired"] = key(
        "preference", "of the rows: preference, for a loss of pairs; unpaired, with scores, for the loss regression"
    )
    loss: RewardLoss = key(block(PairwiseLoss), "the loss of a pair or a reply, and what it needs")

    @model_validator(mode="after")
    def _check(self) -> "TrainRm":
        needed = "unpaired" if isinstance(self.loss, RegressionLoss) else "preference"
        if self.kind != needed:
            raise ValueError(f"kind must be {needed} with a loss of type {self.loss.type}, found {self.kind}")
        return self
