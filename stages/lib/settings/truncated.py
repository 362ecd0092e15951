"""What becomes of the score of a response that was cut off at max_new_tokens, each way with the keys it has."""

from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt
from pydantic import Field

from stages.lib.command.json_schema import LARGEST_NUMBER
from stages.lib.settings.bounds import NotNegative
from stages.lib.settings.declaration import Settings, key

AnyScore = Annotated[float, Ge(-LARGEST_NUMBER), Le(LARGEST_NUMBER)]


class MissingEos(Settings):
    """The score less a penalty."""

    type: Literal["missing_eos"] = key("missing_eos", "the score less a penalty")
    penalty: NotNegative = key(
        2.0, "taken off, two deviations of the default run's scores; 0: nothing is", unit="of the reward"
    )


class StopProperly(Settings):
    """A share of a score above 0; one below 0 stays, since a share of it would reward what is bad for being cut off."""

    type: Literal["stop_properly"] = key("stop_properly", "a share of the score where it is above 0, else all of it")
    share: Annotated[float, Ge(0), Lt(1)] = key(0.0, "what is left of a score above 0")


class FixedScore(Settings):
    """One score for all of them, whatever they say."""

    type: Literal["fixed_score"] = key(
        "fixed_score", "one score, whatever the response says", source="the EOS trick of arXiv 2403.17031"
    )
    score: AnyScore = key(-1.0, "of each response that does not end", unit="of the reward")


Truncated = Annotated[MissingEos | StopProperly | FixedScore, Field(discriminator="type")]
