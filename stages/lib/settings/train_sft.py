"""Section `train_sft` of params.yaml: supervised fine-tuning."""

from stages.lib.settings.bounds import Count, Text
from stages.lib.settings.declaration import key
from stages.lib.settings.epochs import EpochSettings


class TrainSft(EpochSettings):
    """Supervised fine-tuning on conversations."""

    model: Text = key("models/base", "folder of the language model that training starts from")
    batch_size: Count = key(16, "in an optimizer step, over all processes", unit="rows")
    eval_every: Count = key(250, "between two evaluations; the last step is always evaluated", unit="optimizer steps")
