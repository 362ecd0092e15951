"""The losses of train_unpaired, each with the keys it has."""

from typing import Annotated, Literal

from pydantic import Field

from stages.lib.settings.bounds import Positive
from stages.lib.settings.declaration import Settings, key


class KtoLoss(Settings):
    """KTO: what replies are worth to a human who measures gains and losses from a reference point, the policy's KL."""

    type: Literal["kto"] = key("kto", "KTO", source="arXiv 2402.01306")
    beta: Positive = key(0.1, "how fast the value of a reply saturates", source="arXiv 2402.01306")
    desirable_weight: Positive = key(
        1.0,
        "λ_D, of good replies; times their number it should be 1 to 4/3 times λ_U times the number of bad ones",
        source="arXiv 2402.01306",
    )
    undesirable_weight: Positive = key(1.0, "λ_U, of bad replies", source="arXiv 2402.01306")


class BcoLoss(Settings):
    """BCO: a classifier of good and bad replies, whose logit is the implicit reward less its running mean."""

    type: Literal["bco"] = key("bco", "BCO", source="arXiv 2404.04656")
    beta: Positive = key(0.1, "strength of the tie to the reference", source="arXiv 2404.04656")


class ApoZeroUnpairedLoss(Settings):
    """APO-zero: good replies become more likely than under the reference, bad ones less."""

    type: Literal["apo_zero_unpaired"] = key(
        "apo_zero_unpaired", "APO-zero, on single replies", source="arXiv 2408.06266, Eq 7"
    )
    beta: Positive = key(0.1, "strength of the tie to the reference", source="arXiv 2408.06266, Eq 7")


UnpairedLoss = Annotated[KtoLoss | BcoLoss | ApoZeroUnpairedLoss, Field(discriminator="type")]
