"""What the blocks of `rewards` have in common."""

from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import StrictBool

from stages.lib.settings.bounds import Text, WholeNumber
from stages.lib.settings.declaration import Settings, key

Weight = Annotated[float, Ge(-1e6), Le(1e6)]


class RowsWhere(Settings):
    """The rows that a reward applies to."""

    fact: Text = key("source", "of the row's facts; source: the name of the row's source, unless it is a fact")
    value: Text | StrictBool | WholeNumber = key("gsm8k", "that it has in those rows")


class RewardPart(Settings):
    """What every reward has."""

    type: str = key("", "of the reward")
    weight: Weight = key(1.0, "in the sum; 0: it is measured, and is no part of the sum")
    where: RowsWhere | None = key(None, "the rows it applies to, by the value of a fact; null: all")
    missing: Literal["stop", "skip"] = key(
        "stop",
        "where it fails, gives no number or is late: stop: end the run | skip: count it, and add nothing to the sum",
    )
