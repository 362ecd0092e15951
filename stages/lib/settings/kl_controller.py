"""How the coefficient of the KL to the reference is chosen, each way with the keys it has."""

from typing import Annotated, Literal

from pydantic import Field

from stages.lib.settings.bounds import NotNegative, Positive
from stages.lib.settings.declaration import Settings, key


class FixedKl(Settings):
    """One coefficient throughout."""

    type: Literal["fixed"] = key("fixed", "the coefficient stays as it is")
    coef: NotNegative = key(0.05, "β; 0: no KL and no reference", source="arXiv 2203.02155, Eq 2")


class AdaptiveKl(Settings):
    """A coefficient that is steered so that the KL stays near a target."""

    type: Literal["adaptive"] = key(
        "adaptive", "the coefficient is steered towards a target KL", source="arXiv 1909.08593, section 2.2"
    )
    coef: Positive = key(0.05, "β, the first one")
    target: Positive = key(6.0, "KL to hold", unit="nats per response")
    horizon: Positive = key(
        10_000.0, "over which the controller acts; more than a fifth of those of a phase", unit="responses"
    )


KlController = Annotated[FixedKl | AdaptiveKl, Field(discriminator="type")]
