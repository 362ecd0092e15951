"""How much the entropy of the policy counts in its loss, each way with the keys it has."""

from typing import Annotated, Literal

from pydantic import Field

from stages.lib.settings.bounds import NotNegative, Positive
from stages.lib.settings.declaration import Settings, key

SKYWORK = "Skywork-OR1, arXiv 2505.22312"


class NoEntropyBonus(Settings):
    """The entropy is measured, and moves nothing."""

    type: Literal["none"] = key("none", "the loss holds no entropy")


class FixedEntropyBonus(Settings):
    """A coefficient times the entropy of each token's distribution is taken off the loss."""

    type: Literal["fixed"] = key("fixed", "one coefficient throughout", source="arXiv 1707.06347, Eq 9")
    coef: Positive = key(0.01, "c, of the mean entropy of a token", source="arXiv 1707.06347, section 6.1")


class AdaptiveEntropyBonus(Settings):
    """A coefficient that grows while the entropy is below a target, and acts only there."""

    type: Literal["adaptive"] = key(
        "adaptive", "the coefficient acts and grows where the entropy is below a target", source=SKYWORK
    )
    coef: NotNegative = key(0.0, "c, the first one", source=SKYWORK)
    target: Positive = key(0.2, "entropy to hold", unit="nats per token", source=SKYWORK)
    step: Positive = key(0.005, "by which c moves after each phase, and never below 0", source=SKYWORK)


EntropyBonus = Annotated[NoEntropyBonus | FixedEntropyBonus | AdaptiveEntropyBonus, Field(discriminator="type")]
