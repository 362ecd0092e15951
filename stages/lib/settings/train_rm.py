"""Section `train_rm` of params.yaml: the reward model."""

from typing import Literal

from stages.lib.settings.bounds import Count, Text
from stages.lib.settings.declaration import block, key
from stages.lib.settings.epochs import EpochSettings
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.reward_loss import PairwiseLoss


class TrainRm(EpochSettings):
    """A reward model, trained on pairs (arXiv 2203.02155, Eq 1)."""

    model: Text = key(
        "models/sft",
        "folder that it starts from: a language model (its body, with a new head) or a reward model (with its head)",
    )
    batch_size: Count = key(32, "in an optimizer step, over all processes", unit="pairs")
    eval_every: Count = key(125, "between two evaluations; the last step is always evaluated", unit="optimizer steps")
    keep: Literal["best", "last"] = key("best", "weights to publish; best: those of the best evaluation")
    optimizer: OptimizerSettings = key(
        block(OptimizerSettings, learning_rate=5e-4, weight_decay=0.01), "AdamW, its schedule and clipping"
    )
    loss: PairwiseLoss = key(block(PairwiseLoss), "the loss of a pair, and what it needs")
