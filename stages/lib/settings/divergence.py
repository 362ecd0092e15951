"""The f-divergences by which train_dpo may tie a policy to its reference, each with the keys it has."""

from typing import Annotated, Literal

from annotated_types import Gt, Le
from pydantic import Field

from stages.lib.settings.declaration import Settings, key


class ReverseKl(Settings):
    """KL(π ‖ π_ref), DPO's own."""

    type: Literal["reverse_kl"] = key("reverse_kl", "KL of the policy to the reference; the score is Δ")


class ForwardKl(Settings):
    """KL(π_ref ‖ π)."""

    type: Literal["forward_kl"] = key("forward_kl", "KL of the reference to the policy; the score is 1 − e^−Δ")


class JensenShannon(Settings):
    """The Jensen-Shannon divergence."""

    type: Literal["js"] = key("js", "Jensen-Shannon; the score is log σ(Δ) + log 2")


class AlphaDivergence(Settings):
    """The α-divergence, between the reverse KL (α → 0) and the forward KL (α = 1)."""

    type: Literal["alpha"] = key("alpha", "α-divergence; the score is (1 − e^−αΔ) / α")
    alpha: Annotated[float, Gt(0), Le(1)] = key(
        0.5, "towards 0: reverse KL; 1: forward KL; what TRL calls f_alpha_divergence_coef is 1 − alpha"
    )


AnyDivergence = Annotated[ReverseKl | ForwardKl | JensenShannon | AlphaDivergence, Field(discriminator="type")]
