"""The losses of train_sft."""

from typing import Annotated, Literal

from pydantic import Field

from stages.lib.settings.declaration import Settings, key


class CrossEntropyLoss(Settings):
    """−log π(y_t), the same weight for every token."""

    type: Literal["cross_entropy"] = key("cross_entropy", "the likelihood of the completions")


class DftLoss(Settings):
    """Dynamic fine-tuning: −sg(π(y_t)) log π(y_t). What the model finds unlikely pulls less hard."""

    type: Literal["dft"] = key("dft", "each token's loss times its probability, a constant", source="2508.05629, Eq 9")


TokenLoss = Annotated[CrossEntropyLoss | DftLoss, Field(discriminator="type")]
