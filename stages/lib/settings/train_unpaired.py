"""Section `train_unpaired` of params.yaml: optimisation on single replies that are good or bad."""

from stages.lib.command.params import Seed
from stages.lib.settings.bounds import Count, Text
from stages.lib.settings.declaration import block, key
from stages.lib.settings.epochs import EpochSettings
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.unpaired_loss import KtoLoss, UnpairedLoss


class TrainUnpaired(EpochSettings):
    """A policy trained on replies with a label each, without pairs and without a reward model."""

    reference: Text = key(
        "data/ref_logprobs_unpaired/sft", "folder of the reference's log-probs, as ref_logprobs_unpaired writes it"
    )
    batch_size: Count = key(32, "in an optimizer step, over all processes", unit="replies")
    optimizer: OptimizerSettings = key(block(OptimizerSettings, learning_rate=2e-4), "AdamW, its schedule and clipping")
    seed: Seed | None = key(None, "of the order of rows and of adapters; null: the common seed")
    loss: UnpairedLoss = key(block(KtoLoss), "the loss of a reply, and what it needs")
