"""The losses of train_dpo, each with the keys it has."""

from typing import Annotated, Literal

from annotated_types import Ge, Lt
from pydantic import Field

from stages.lib.settings.bounds import Positive
from stages.lib.settings.declaration import Settings, key


class SigmoidLoss(Settings):
    """DPO: the likelihood of the labels under Bradley and Terry's model of the implicit rewards."""

    type: Literal["sigmoid"] = key("sigmoid", "DPO; with label_smoothing cDPO", source="arXiv 2305.18290, Eq 7")
    beta: Positive = key(0.2, "strength of the tie to the SFT policy", source="arXiv 2305.18290, Eq 3")
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = key(
        0.0,
        "labels taken to be wrong (cDPO)",
        unit="share",
        source="E. Mitchell, A note on DPO with noisy preferences, Eq 3",
    )


class IpoLoss(Settings):
    """IPO: the squared distance of the implicit rewards' gap, a mean over tokens, from 1 / (2 beta)."""

    type: Literal["ipo"] = key("ipo", "IPO, over means of a reply's tokens", source="arXiv 2310.12036, Eq 17")
    beta: Positive = key(0.2, "strength of the tie to the SFT policy; the gap aimed at is 1 / (2 beta)")


PreferenceLoss = Annotated[SigmoidLoss | IpoLoss, Field(discriminator="type")]
