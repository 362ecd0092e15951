"""The losses of train_dpo, each with the keys it has; the formulas are in objectives/preference_losses.py.

β scales the implicit reward β log π(y|x)/π_ref(y|x) in every loss that has one: the smaller, the further the policy may
go. The losses without a reference scale log π(y|x) by it.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import Field, model_validator

from stages.lib.settings.bounds import Name, NotNegative, Positive, Share
from stages.lib.settings.declaration import Settings, block, key
from stages.lib.settings.divergence import AlphaDivergence, AnyDivergence, ForwardKl, ReverseKl

FlipRate = Annotated[float, Ge(0), Lt(0.5)]
MITCHELL = "E. Mitchell, A note on DPO with noisy preferences, Eq 3"


def beta(default: float, source: str) -> Positive:
    """Declare β of a loss that has an implicit reward."""
    return key(default, "scale of the implicit reward: the smaller, the weaker the tie to the reference", source=source)


def wpo() -> bool:
    """Declare whether pairs count by how likely the policy is to sample them."""
    return key(
        False,
        "weigh a pair by how likely the policy is to sample it, at most 1, without gradient",
        source="WPO, arXiv 2406.11827, Eq 2",
    )


def ld_alpha() -> Share:
    """Declare how much the tokens count by which the longer reply is longer."""
    return key(
        1.0,
        "of the tokens beyond the shorter reply's length; 1: all count alike; below 1 it needs ref_logprobs.per_token",
        source="LD-DPO, arXiv 2409.06411",
    )


class ScoreGapLoss(Settings):
    """What the losses on the gap of two replies' scores share."""

    type: str = key("", "of the loss")
    beta: Positive = beta(0.1, "arXiv 2305.18290, appendix B")
    divergence: AnyDivergence = key(
        block(ReverseKl),
        "of policy and reference, which says what score a log-ratio Δ = log π − log π_ref has",
        source="arXiv 2309.16240",
    )
    reference_free: bool = key(False, "take every reply for equally likely under the reference, which is then not read")
    wpo: bool = wpo()

    @model_validator(mode="after")
    def no_divergence_without_reference(self) -> Self:
        """Raise ValueError for a divergence to a reference that does not count."""
        if self.reference_free and self.divergence.type != "reverse_kl":
            raise ValueError("reference_free: true leaves nothing to diverge from; set divergence.type to reverse_kl")
        return self


class SigmoidLoss(ScoreGapLoss):
    """DPO: the likelihood of the labels under Bradley and Terry's model of the implicit rewards."""

    type: Literal["sigmoid"] = key("sigmoid", "DPO; with label_smoothing cDPO", source="arXiv 2305.18290, Eq 7")
    label_smoothing: FlipRate = key(0.0, "labels taken to be wrong (cDPO)", unit="share", source=MITCHELL)
    ld_alpha: Share = ld_alpha()


class RobustLoss(ScoreGapLoss):
    """rDPO: DPO's loss without the bias of labels that are flipped at a known rate."""

    type: Literal["robust"] = key(
        "robust", "rDPO: unbiased under flipped labels", source="arXiv 2403.00409, section 3.1"
    )
    beta: Positive = beta(0.01, "arXiv 2403.00409, appendix B")
    flip_rate: FlipRate = key(0.1, "labels that are known to be wrong", unit="share", source="arXiv 2403.00409")
    ld_alpha: Share = ld_alpha()


class ExoPairLoss(ScoreGapLoss):
    """EXO: the reverse KL of the policy's preference to the smoothed label."""

    type: Literal["exo_pair"] = key("exo_pair", "EXO: reverse KL to the labels", source="arXiv 2402.00856, Eq 16")
    beta: Positive = beta(0.1, "arXiv 2402.00856, appendix B")
    label_smoothing: Annotated[float, Gt(0), Lt(0.5)] = key(
        1e-3,
        "labels taken to be wrong; above 0, as its log is taken",
        unit="share",
        source="arXiv 2402.00856, Eq 16",
    )
    ld_alpha: Share = ld_alpha()


class HingeLoss(ScoreGapLoss):
    """SLiC's hinge on the implicit rewards, as in RSO."""

    type: Literal["hinge"] = key("hinge", "hinge, of SLiC and RSO", source="arXiv 2305.10425; arXiv 2309.06657")
    beta: Positive = beta(0.1, "1 / beta is the margin that is asked for")
    ld_alpha: Share = ld_alpha()


class IpoLoss(ScoreGapLoss):
    """IPO: the squared distance of the gap of log-ratios from 1 / (2 beta)."""

    type: Literal["ipo"] = key(
        "ipo", "IPO: the gap of log-ratios is drawn to 1 / (2 beta)", source="arXiv 2310.12036, Eq 17"
    )
    beta: Positive = beta(0.1, "τ of arXiv 2310.12036")
    over_tokens: Literal["mean", "sum"] = key(
        "mean", "mean: of a reply's log-ratio per token, as its authors mean it; sum: of the whole reply's"
    )


class BcoPairLoss(Settings):
    """BCO on pairs: chosen from rejected by the reward's distance from its running mean."""

    type: Literal["bco_pair"] = key(
        "bco_pair",
        "BCO on pairs: a classifier around the running mean of rewards",
        source="arXiv 2404.04656, section 4",
    )
    beta: Positive = beta(0.01, "arXiv 2404.04656, appendix C")
    wpo: bool = wpo()


class SppoHardLoss(Settings):
    """SPPO with labels for win rates."""

    type: Literal["sppo_hard"] = key(
        "sppo_hard", "SPPO: log-ratios are drawn to ±1 / (2 beta)", source="arXiv 2405.00675, Eq 4.7"
    )
    beta: Positive = beta(1e-3, "1 / η of arXiv 2405.00675")
    wpo: bool = wpo()


class NcaPairLoss(Settings):
    """NCA on pairs: rewards by noise contrastive estimation."""

    type: Literal["nca_pair"] = key(
        "nca_pair", "NCA on pairs: holds up the chosen replies' likelihood", source="arXiv 2402.05369, section 4.1"
    )
    beta: Positive = beta(0.01, "α of arXiv 2402.05369, appendix C")
    wpo: bool = wpo()


class AotLoss(Settings):
    """AOT on pairs: the policy's sorted gaps against the reference's, over the optimizer step."""

    type: Literal["aot"] = key(
        "aot", "AOT: sorted gaps of the policy against those of the reference", source="arXiv 2406.05882, section 3"
    )
    beta: Positive = beta(0.1, "as DPO")
    label_smoothing: FlipRate = key(0.0, "labels taken to be wrong", unit="share", source=MITCHELL)


class AotUnpairedLoss(Settings):
    """AOT without pairs: the sorted rewards of chosen replies against those of rejected ones, over the step."""

    type: Literal["aot_unpaired"] = key(
        "aot_unpaired",
        "AOT: sorted log-ratios of chosen replies against those of rejected ones",
        source="arXiv 2406.05882, section 3",
    )
    beta: Positive = beta(0.1, "as DPO")
    label_smoothing: FlipRate = key(0.0, "labels taken to be wrong", unit="share", source=MITCHELL)


class ApoZeroLoss(Settings):
    """APO-zero: chosen replies become likelier, rejected ones less likely."""

    type: Literal["apo_zero"] = key(
        "apo_zero", "APO-zero, for chosen replies better than the model's", source="arXiv 2408.06266, Eq 7"
    )
    beta: Positive = beta(0.1, "arXiv 2408.06266, section 5.2")
    wpo: bool = wpo()


class ApoDownLoss(Settings):
    """APO-down: both replies become less likely, rejected ones more so."""

    type: Literal["apo_down"] = key(
        "apo_down", "APO-down, for chosen replies worse than the model's", source="arXiv 2408.06266, Eq 8"
    )
    beta: Positive = beta(0.1, "arXiv 2408.06266, section 5.2")
    wpo: bool = wpo()


class DiscopopLoss(ScoreGapLoss):
    """DiscoPOP: a blend of the logistic and the exponential loss that was found by search."""

    type: Literal["discopop"] = key(
        "discopop", "DiscoPOP: logistic and exponential loss, blended", source="arXiv 2406.08414, Eq 5"
    )
    beta: Positive = beta(0.05, "arXiv 2406.08414, appendix B.1")
    blend_temperature: Positive = key(0.05, "τ of the blend σ(β h / τ)", source="arXiv 2406.08414, appendix E")
    ld_alpha: Share = ld_alpha()


class SigmoidNormLoss(ScoreGapLoss):
    """Length-normalised DPO, of Tülu 3."""

    type: Literal["sigmoid_norm"] = key(
        "sigmoid_norm", "DPO on log-ratios per token", source="Tülu 3, arXiv 2411.15124, section 5.1.2"
    )
    beta: Positive = beta(5.0, "arXiv 2411.15124")


class SftLoss(Settings):
    """Cross-entropy of the chosen replies, mostly a part of a mixture (RPO, MPO)."""

    type: Literal["sft"] = key(
        "sft",
        "cross-entropy of the chosen replies, a mean over the tokens of the optimizer step",
        source="RPO, arXiv 2404.19733; arXiv 2405.16436",
    )


class SimpoLoss(Settings):
    """SimPO: a margin between the mean log-probs of two replies, without a reference."""

    type: Literal["simpo"] = key("simpo", "SimPO, without a reference", source="arXiv 2405.14734")
    beta: Positive = beta(2.0, "arXiv 2405.14734")
    target_margin: NotNegative = key(1.0, "γ, of the rewards beta log π / |y|", source="arXiv 2405.14734")
    wpo: bool = wpo()


class CpoLoss(Settings):
    """CPO: DPO without a reference, and the cross-entropy of the chosen reply."""

    type: Literal["cpo"] = key("cpo", "CPO, without a reference", source="arXiv 2401.08417")
    beta: Positive = beta(0.1, "arXiv 2401.08417")
    sft_weight: NotNegative = key(
        1.0, "of the cross-entropy of the chosen replies, a mean over the step's tokens", source="arXiv 2401.08417"
    )


class OrpoLoss(Settings):
    """ORPO: the cross-entropy of the chosen reply, and a penalty on the odds ratio of the two."""

    type: Literal["orpo"] = key("orpo", "ORPO, without a reference", source="arXiv 2403.07691")
    odds_weight: Positive = key(0.1, "λ, of the odds ratio's part", source="arXiv 2403.07691")


PairLoss = Annotated[
    SigmoidLoss
    | RobustLoss
    | ExoPairLoss
    | HingeLoss
    | IpoLoss
    | BcoPairLoss
    | SppoHardLoss
    | NcaPairLoss
    | AotLoss
    | AotUnpairedLoss
    | ApoZeroLoss
    | ApoDownLoss
    | DiscopopLoss
    | SigmoidNormLoss
    | SftLoss
    | SimpoLoss
    | CpoLoss
    | OrpoLoss,
    Field(discriminator="type"),
]
WITHOUT_REFERENCE = ("sft", "simpo", "cpo", "orpo")


class WeightedLoss(Settings):
    """A loss of a mixture."""

    weight: Positive = key(1.0, "of this loss in the sum")
    loss: PairLoss = key(block(SigmoidLoss), "the loss of a pair, and what it needs")


class MixtureLoss(Settings):
    """A weighted sum of losses, such as RPO (sigmoid and sft) or MPO (sigmoid, bco_pair and sft)."""

    type: Literal["mixture"] = key("mixture", "a weighted sum: RPO, MPO", source="arXiv 2404.19733; arXiv 2411.10442")
    parts: Annotated[dict[Name, WeightedLoss], MinLen(1)] = key(
        {"preference": block(WeightedLoss), "sft": block(WeightedLoss, loss=block(SftLoss))},
        "by a name for each; the rewards of the curve have the beta of the first that has one",
    )


PreferenceLoss = Annotated[PairLoss | MixtureLoss, Field(discriminator="type")]


def weighted_losses(loss: PreferenceLoss) -> Mapping[str, WeightedLoss]:
    """The losses of a mixture, by name; a loss by itself is its only part, by the name of its type."""
    if isinstance(loss, MixtureLoss):
        return loss.parts
    return {loss.type: WeightedLoss(weight=1.0, loss=loss)}


def needs_reference(loss: PreferenceLoss) -> bool:
    """Whether a loss, or one of a mixture, reads log-probs of a reference."""
    return any(reads_reference(part.loss) for part in weighted_losses(loss).values())


def reads_reference(loss: PairLoss) -> bool:
    return loss.type not in WITHOUT_REFERENCE and not getattr(loss, "reference_free", False)


def needs_tokens_of_reference(loss: PreferenceLoss) -> bool:
    """Whether one of the losses reads the reference's log-prob of each token."""
    return any(
        discount_of_length(part.loss) != 1 and reads_reference(part.loss) for part in weighted_losses(loss).values()
    )


def discount_of_length(loss: PairLoss) -> float:
    """LD-DPO's α; 1 where a loss has none."""
    return getattr(loss, "ld_alpha", 1.0)


def is_weighted(loss: PairLoss) -> bool:
    """Whether a loss weighs its pairs as WPO does."""
    return getattr(loss, "wpo", False)


def has_exponents(loss: PairLoss) -> bool:
    """Whether a loss has exponents that may have to be held at their limit."""
    if isinstance(loss, DiscopopLoss):
        return True
    return isinstance(loss, ScoreGapLoss) and isinstance(loss.divergence, ForwardKl | AlphaDivergence)
