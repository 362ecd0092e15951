"""The settings of a stage that passes over a table of rows: how often, in which batches and numbers, what it keeps."""

from collections.abc import Iterable
from typing import Literal

from stages.lib.command.errors import StageError
from stages.lib.command.quoted import nearest
from stages.lib.settings.bounds import Count, NotNegative, Positive, Precision, SaveDtype, Text
from stages.lib.settings.declaration import Settings, block, key
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.router_loss import RouterLoss
from stages.lib.settings.save_every import SaveEvery, save_every
from stages.lib.settings.training_tokens import TrainingTokens


class BestBy(Settings):
    """Which of two evaluations on the validation rows is better."""

    metric: Text = key("loss", "as the curve names it behind validation/")
    better: Literal["lower", "higher"] = key("lower", "higher: as of an accuracy or a margin")


def require_compared_metric(best_by: BestBy, metrics: Iterable[str], key: str) -> None:
    """Raise StageError, naming `key`, if the metric that evaluations are compared by is none of these."""
    name, known = best_by.metric, [*metrics]
    if name not in known:
        raise StageError(
            f"params.yaml: {key}.best_by.metric: there is no metric {name!r} here{nearest(name, known)}; there are "
            f"{', '.join(known)}"
        )


class EarlyStopping(Settings):
    """When a training stage ends before its last planned step; learning rates stay those of the whole plan."""

    patience: Count = key(3, "in a row that bring nothing better", unit="evaluations")
    min_delta: NotNegative = key(0.0, "by more than which an evaluation must be better, in units of the metric")


class EpochSettings(TrainingTokens):
    """What the sections train_sft, train_rm, train_dpo and train_unpaired of params.yaml share."""

    model: Text = key("models/sft", "folder of the language model that training starts from")
    epochs: Positive = key(1.0, "passes over the rows, may be a fraction")
    batch_size: Count = key(32, "in an optimizer step, over all processes", unit="rows")
    precision: Precision = key("fp32", "of weights and activations; the masters are float32 either way")
    save_dtype: SaveDtype = key("float32", "of the saved weights")
    eval_every: Count = key(100, "between two evaluations; the last step is always evaluated", unit="optimizer steps")
    keep: Literal["best", "last"] = key("last", "weights to publish; best: those of the best evaluation")
    best_by: BestBy = key(block(BestBy), "what keep: best and early_stopping compare evaluations by")
    early_stopping: EarlyStopping | None = key(None, "null: every step is taken; else a block: patience, min_delta")
    save_every: SaveEvery | None = save_every()
    lora: LoraSettings | None = key(None, "null: every weight is trained; else adapters on a frozen base, a block")
    router_loss: RouterLoss | None = key(
        None, "null: none; else a loss that balances the experts of a mixture of experts, a block"
    )
    optimizer: OptimizerSettings = key(block(OptimizerSettings), "AdamW, its schedule and clipping")
