"""The losses of train_rm, each with the keys it has."""

from typing import Annotated, Literal

from annotated_types import Ge, Lt
from pydantic import Field

from stages.lib.settings.bounds import NotNegative
from stages.lib.settings.declaration import Settings, key


class PairwiseLoss(Settings):
    """Bradley and Terry's model of preferences: the likelihood that the chosen reply is preferred."""

    type: Literal["pairwise"] = key("pairwise", "of pairs: Bradley and Terry's model", source="arXiv 2203.02155, Eq 1")
    use_margin: bool = key(False, "subtract each pair's `margin` in the loss", source="arXiv 2307.09288, Eq 2")
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = key(
        0.0,
        "labels taken to be wrong",
        unit="share",
        source="E. Mitchell, A note on DPO with noisy preferences, Eq 3",
    )
    centering_coefficient: NotNegative = key(
        0.0,
        "of the squared sum of a pair's scores, which holds scores around 0, such as 0.01",
        source="arXiv 2312.09244, Eq 2",
    )


class RegressionLoss(Settings):
    """The squared difference of a reply's score from the one that the data gives it."""

    type: Literal["regression"] = key(
        "regression", "of replies with a score (kind unpaired): the squared error", source="arXiv 2406.08673"
    )


RewardLoss = Annotated[PairwiseLoss | RegressionLoss, Field(discriminator="type")]
