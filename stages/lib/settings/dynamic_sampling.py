"""Dynamic sampling: groups that teach nothing are replaced by groups of further prompts."""

from typing import Annotated, Self

from annotated_types import Ge, Le
from pydantic import model_validator

from stages.lib.command.json_schema import LARGEST_NUMBER
from stages.lib.settings.declaration import Settings, key

MeanReward = Annotated[float, Ge(-LARGEST_NUMBER), Le(LARGEST_NUMBER)]


class DynamicSampling(Settings):
    """Which groups are kept, and how often others are asked for; what was kept stays, and is trained on."""

    refill_rounds: Annotated[int, Ge(0), Le(1000)] = key(
        3,
        "most times that a phase asks as many further prompts as it has left out; then it trains on what there is",
        source="DAPO, arXiv 2503.14476, section 3.2",
    )
    above: MeanReward | None = key(
        None, "keep groups whose mean reward (without the KL) is above this; null: no bound", unit="of the reward"
    )
    below: MeanReward | None = key(
        None, "keep those whose mean reward is below this; null: no bound", unit="of the reward"
    )

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.above is not None and self.below is not None and self.above >= self.below:
            raise ValueError(f"above ({self.above}) must be less than below ({self.below}), or no group is kept")
        return self
