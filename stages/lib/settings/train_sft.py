"""Section `train_sft` of params.yaml: supervised fine-tuning."""

from stages.lib.settings.bounds import Count, Positive, Text
from stages.lib.settings.declaration import block, key
from stages.lib.settings.epochs import EpochSettings
from stages.lib.settings.token_loss import CrossEntropyLoss, TokenLoss


class TrainSft(EpochSettings):
    """Supervised fine-tuning on conversations."""

    model: Text = key("models/base", "folder of the language model that training starts from")
    batch_size: Count = key(16, "in an optimizer step, over all processes", unit="rows")
    eval_every: Count = key(250, "between two evaluations; the last step is always evaluated", unit="optimizer steps")
    loss: TokenLoss = key(block(CrossEntropyLoss), "the loss of a token")
    neftune_alpha: Positive | None = key(
        None,
        "size of uniform noise on the embeddings while training, such as 5; null: none",
        source="NEFTune, arXiv 2310.05914, Algorithm 1",
    )
