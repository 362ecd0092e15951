"""Losses on pairs of replies from sums of log-probs under policy and reference: one function each, and their table.

Each takes n pairs and its own settings and returns one loss a pair, (n,), in nats unless it says otherwise; the caller
sums, and divides by the pairs of the whole optimizer step. With the log-ratios Δ_c = log π(y_c|x) − log π_ref(y_c|x)
and Δ_r likewise, and with the scores s(Δ) of a divergence (`divergences.py`; for the reverse KL s(Δ) = Δ),
h = s(Δ_c) − s(Δ_r).

"First value" is that of a policy that is its reference.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from stages.lib.objectives.divergences import EXPONENT_LIMIT, exponent_rate, scores
from stages.lib.settings import preference_loss as of

# A reply's mean log-prob is held below this, or the odds of a reply of probability 1 would be infinite.
LARGEST_MEAN_LOGP = -1e-7


class StepTies(NamedTuple):
    """What a loss needs to know of the whole optimizer step (`step_ties.py`). Without gradient."""

    mean_chosen_length: float = 1.0  # the step's tokens of chosen replies over its pairs
    shift: float = 0.0  # bco_pair's δ
    # aot, aot_unpaired: of each of the n pairs what stands at its place in the other sorted list. Shapes: (n,)
    beside_chosen: torch.Tensor | None = None
    beside_rejected: torch.Tensor | None = None


class PairBatch(NamedTuple):
    """n pairs, as a loss sees them. Every field has shape (n,); log-probs are sums over a completion, EOS included."""

    policy_chosen_logps: torch.Tensor
    policy_rejected_logps: torch.Tensor
    reference_chosen_logps: torch.Tensor  # 0 for a loss without a reference
    reference_rejected_logps: torch.Tensor
    chosen_lengths: torch.Tensor  # completion tokens, at least 1
    rejected_lengths: torch.Tensor
    ties: StepTies = StepTies()

    @property
    def chosen_log_ratios(self) -> torch.Tensor:
        """Δ_c, (n,)."""
        return self.policy_chosen_logps - self.reference_chosen_logps

    @property
    def rejected_log_ratios(self) -> torch.Tensor:
        """Δ_r, (n,)."""
        return self.policy_rejected_logps - self.reference_rejected_logps

    @property
    def policy_gaps(self) -> torch.Tensor:
        """log π(y_c|x) − log π(y_r|x), (n,)."""
        return self.policy_chosen_logps - self.policy_rejected_logps

    @property
    def reference_gaps(self) -> torch.Tensor:
        """log π_ref(y_c|x) − log π_ref(y_r|x), (n,)."""
        return self.reference_chosen_logps - self.reference_rejected_logps


def score_gaps(pairs: PairBatch, settings: Any) -> torch.Tensor:
    """h = s(Δ_c) − s(Δ_r) under the settings' divergence, (n,)."""
    divergence = settings.divergence
    return scores(pairs.chosen_log_ratios, divergence) - scores(pairs.rejected_log_ratios, divergence)


def mean_score_gaps(pairs: PairBatch, settings: Any, limit: float = EXPONENT_LIMIT) -> torch.Tensor:
    """s(Δ_c) / |y_c| − s(Δ_r) / |y_r|, (n,)."""
    chosen = scores(pairs.chosen_log_ratios, settings.divergence, limit) / pairs.chosen_lengths
    return chosen - scores(pairs.rejected_log_ratios, settings.divergence, limit) / pairs.rejected_lengths


def smoothed_logistic(gaps: torch.Tensor, smoothing: float) -> torch.Tensor:
    """−(1 − ε) log σ(x) − ε log σ(−x), of the shape of x; its least value is where σ(x) = 1 − ε."""
    return -(1 - smoothing) * F.logsigmoid(gaps) - smoothing * F.logsigmoid(-gaps)


def sigmoid(pairs: PairBatch, settings: of.SigmoidLoss) -> torch.Tensor:
    """−(1 − ε) log σ(β h) − ε log σ(−β h); first value log 2.

    ε = 0 is DPO (arXiv 2305.18290, Eq. 7); ε > 0 is cDPO (Mitchell, "A note on DPO with noisy preferences", Eq. 3), for
    labels flipped with probability ε: its optimum is σ(β h) = 1 − ε.
    """
    return smoothed_logistic(settings.beta * score_gaps(pairs, settings), settings.label_smoothing)


def robust(pairs: PairBatch, settings: of.RobustLoss) -> torch.Tensor:
    """[−(1 − ε) log σ(β h) + ε log σ(−β h)] / (1 − 2ε); first value log 2.

    rDPO (arXiv 2403.00409): its mean over labels that are flipped at rate ε is DPO's loss on the true labels. It has
    no lower bound: for large h its slope is −εβ / (1 − 2ε).
    """
    scaled_gaps, rate = settings.beta * score_gaps(pairs, settings), settings.flip_rate
    return (-(1 - rate) * F.logsigmoid(scaled_gaps) + rate * F.logsigmoid(-scaled_gaps)) / (1 - 2 * rate)


def exo_pair(pairs: PairBatch, settings: of.ExoPairLoss) -> torch.Tensor:
    """q (log q − log(1 − ε)) + (1 − q) (log(1 − q) − log ε), q = σ(β h); first value −log 2 − ½ log(ε (1 − ε)).

    EXO (arXiv 2402.00856, Eq. 16): the KL of the policy's preference (q, 1 − q) to the label (1 − ε, ε).
    """
    scaled_gaps = settings.beta * score_gaps(pairs, settings)
    log_labels = torch.tensor([1 - settings.label_smoothing, settings.label_smoothing], dtype=torch.float64).log()
    losses = torch.zeros_like(scaled_gaps)
    for sign, log_label in zip((1, -1), log_labels.tolist(), strict=True):
        log_share = F.logsigmoid(sign * scaled_gaps)
        losses = losses + log_share.exp() * (log_share - log_label)
    return losses


def hinge(pairs: PairBatch, settings: of.HingeLoss) -> torch.Tensor:
    """max(0, 1 − β h); first value 1.

    SLiC (arXiv 2305.10425) on implicit rewards, as in RSO (arXiv 2309.06657).
    """
    return F.relu(1 - settings.beta * score_gaps(pairs, settings))


def ipo(pairs: PairBatch, settings: of.IpoLoss) -> torch.Tensor:
    """(s(Δ_c) / |y_c| − s(Δ_r) / |y_r| − 1 / (2β))², in squared nats per token; first value 1 / (4β²).

    IPO (arXiv 2310.12036, Eq. 17), with log-ratios averaged over the tokens of each completion, as its authors
    confirmed to TRL. With over_tokens: sum it is (h − 1 / (2β))², whose numbers do not compare with those.

    A score is squared here, so its exponent is held at half of `EXPONENT_LIMIT`.
    """
    averaged = pairs
    if settings.over_tokens == "sum":
        averaged = pairs._replace(chosen_lengths=1, rejected_lengths=1)  # pyrefly: ignore[bad-argument-type]
    return (mean_score_gaps(averaged, settings, EXPONENT_LIMIT / 2) - 1 / (2 * settings.beta)) ** 2


def bco_pair(pairs: PairBatch, settings: of.BcoPairLoss) -> torch.Tensor:
    """−log σ(β Δ_c − δ) − log σ(δ − β Δ_r); first value 2 log 2.

    BCO (arXiv 2404.04656); δ is the mean of β Δ over all replies of this optimizer step and those before it.
    """
    chosen, rejected = implicit_rewards(pairs, settings.beta)
    return -F.logsigmoid(chosen - pairs.ties.shift) - F.logsigmoid(pairs.ties.shift - rejected)


def sppo_hard(pairs: PairBatch, settings: of.SppoHardLoss) -> torch.Tensor:
    """(Δ_c − 1 / (2β))² + (Δ_r + 1 / (2β))², in squared nats; first value 1 / (2β²).

    SPPO (arXiv 2405.00675, Eq. 4.7) with win rates of 1 and 0, β = 1 / η.
    """
    target = 1 / (2 * settings.beta)
    return (pairs.chosen_log_ratios - target) ** 2 + (pairs.rejected_log_ratios + target) ** 2


def nca_pair(pairs: PairBatch, settings: of.NcaPairLoss) -> torch.Tensor:
    """−log σ(β Δ_c) − ½ log σ(−β Δ_c) − ½ log σ(−β Δ_r); first value 2 log 2.

    NCA (arXiv 2402.05369).
    """
    chosen, rejected = implicit_rewards(pairs, settings.beta)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def aot(pairs: PairBatch, settings: of.AotLoss) -> torch.Tensor:
    """−(1 − ε) log σ(β d) − ε log σ(−β d), d = u − v; first value log 2.

    AOT on pairs (arXiv 2406.05882): the gaps u of the policy, sorted, each beside the gap v of the reference that has
    its place in their own order, over all pairs of the optimizer step.
    """
    assert pairs.ties.beside_chosen is not None, "step_ties gives what stands at a pair's place"
    return smoothed_logistic(settings.beta * (pairs.policy_gaps - pairs.ties.beside_chosen), settings.label_smoothing)


def aot_unpaired(pairs: PairBatch, settings: of.AotUnpairedLoss) -> torch.Tensor:
    """−(1 − ε) log σ(β d) − ε log σ(−β d), d = a − b; first value log 2.

    AOT without pairs (arXiv 2406.05882): the Δ_c, sorted, are the a, and the Δ_r, sorted, the b, over all pairs of the
    optimizer step. A term has two replies, of different pairs as a rule: each pair's loss is half of the term of its
    chosen reply and half of that of its rejected one, with the whole gradient by its own replies.
    """
    beside_chosen, beside_rejected = pairs.ties.beside_chosen, pairs.ties.beside_rejected
    assert beside_chosen is not None, "step_ties gives what stands at a reply's place"
    assert beside_rejected is not None, "for rejected replies too"
    smoothing = settings.label_smoothing
    terms = smoothed_logistic(settings.beta * (pairs.chosen_log_ratios - beside_chosen), smoothing)
    terms = terms + smoothed_logistic(settings.beta * (beside_rejected - pairs.rejected_log_ratios), smoothing)
    return terms - terms.detach() / 2


def apo_zero(pairs: PairBatch, settings: of.ApoZeroLoss) -> torch.Tensor:
    """1 − σ(β Δ_c) + σ(β Δ_r); first value 1.

    APO-zero (arXiv 2408.06266, Eq. 7).
    """
    chosen, rejected = implicit_rewards(pairs, settings.beta)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(pairs: PairBatch, settings: of.ApoDownLoss) -> torch.Tensor:
    """σ(β Δ_c) + 1 − σ(β (Δ_c − Δ_r)); first value 1.

    APO-down (arXiv 2408.06266, Eq. 8).
    """
    chosen, rejected = implicit_rewards(pairs, settings.beta)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def discopop(pairs: PairBatch, settings: of.DiscopopLoss) -> torch.Tensor:
    """−(1 − m) log σ(z) + m e^−z, z = β h, m = σ(z / τ); first value ½ log 2 + ½.

    DiscoPOP (arXiv 2406.08414, Eq. 5). The exponent −z is held at `EXPONENT_LIMIT`; there m is 0 in any precision.
    """
    scaled_gaps = settings.beta * score_gaps(pairs, settings)
    blend = scaled_gaps / settings.blend_temperature
    exponential = torch.exp((-scaled_gaps).clamp(max=EXPONENT_LIMIT))
    return -torch.sigmoid(-blend) * F.logsigmoid(scaled_gaps) + torch.sigmoid(blend) * exponential


def sigmoid_norm(pairs: PairBatch, settings: of.SigmoidNormLoss) -> torch.Tensor:
    """−log σ(β (s(Δ_c) / |y_c| − s(Δ_r) / |y_r|)); first value log 2.

    Length-normalised DPO (Tülu 3, arXiv 2411.15124, section 5.1.2).
    """
    return -F.logsigmoid(settings.beta * mean_score_gaps(pairs, settings))


def sft(pairs: PairBatch, _settings: of.SftLoss | None = None) -> torch.Tensor:
    """−log π(y_c|x) · n / Σ_i |y_c,i|, the sums over the optimizer step: its mean over pairs is that over tokens.

    Cross-entropy of the chosen replies (RPO, arXiv 2404.19733; arXiv 2405.16436).
    """
    return -pairs.policy_chosen_logps / pairs.ties.mean_chosen_length


def simpo(pairs: PairBatch, settings: of.SimpoLoss) -> torch.Tensor:
    """−log σ(β (log π(y_c|x) / |y_c| − log π(y_r|x) / |y_r|) − γ)

    SimPO (arXiv 2405.14734).
    """
    chosen, rejected = mean_logps(pairs)
    return -F.logsigmoid(settings.beta * (chosen - rejected) - settings.target_margin)


def cpo(pairs: PairBatch, settings: of.CpoLoss) -> torch.Tensor:
    """−log σ(β (log π(y_c|x) − log π(y_r|x))) + w · `sft`

    CPO (arXiv 2401.08417); its cross-entropy is a mean over the tokens of the step.
    """
    return -F.logsigmoid(settings.beta * pairs.policy_gaps) + settings.sft_weight * sft(pairs)


def orpo(pairs: PairBatch, settings: of.OrpoLoss) -> torch.Tensor:
    """`sft` − λ log σ(log odds(y_c|x) − log odds(y_r|x)), odds(y|x) = p / (1 − p), log p = log π(y|x) / |y|

    ORPO (arXiv 2403.07691); its cross-entropy is a mean over the tokens of the step.
    """
    chosen, rejected = (log_odds(logps.clamp(max=LARGEST_MEAN_LOGP)) for logps in mean_logps(pairs))
    return sft(pairs) - settings.odds_weight * F.logsigmoid(chosen - rejected)


def mean_logps(pairs: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """log π(y|x) / |y| of the chosen and of the rejected replies, (n,) each."""
    return pairs.policy_chosen_logps / pairs.chosen_lengths, pairs.policy_rejected_logps / pairs.rejected_lengths


def log_odds(logps: torch.Tensor) -> torch.Tensor:
    """log p − log(1 − p) from log p < 0, of its shape; 1 − e^x is exact near p = 1 as −expm1(x)."""
    return logps - torch.log(-torch.expm1(logps))


# By the name of the settings' type. A new loss is a function here, its block of settings, and a line.
PREFERENCE_LOSSES: dict[str, Callable[[PairBatch, Any], torch.Tensor]] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "exo_pair": exo_pair,
    "hinge": hinge,
    "ipo": ipo,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "nca_pair": nca_pair,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sigmoid_norm": sigmoid_norm,
    "sft": sft,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
}


def implicit_rewards(pairs: PairBatch, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """β Δ_c and β Δ_r, (n,) each (arXiv 2305.18290, section 4)."""
    return beta * pairs.chosen_log_ratios, beta * pairs.rejected_log_ratios


def clamped_shares(pairs: PairBatch, loss: of.PairLoss) -> torch.Tensor:
    """Of the exponents that a loss takes of a pair, the share that is held at its limit. Shape: (n,), no gradient.

    Args:
        loss: one of those that have exponents.
    """
    limit = EXPONENT_LIMIT / 2 if isinstance(loss, of.IpoLoss) else EXPONENT_LIMIT
    rate = exponent_rate(loss.divergence) if isinstance(loss, of.ScoreGapLoss) else 0.0
    exponents = [-rate * ratios for ratios in (pairs.chosen_log_ratios, pairs.rejected_log_ratios)] if rate else []
    if isinstance(loss, of.DiscopopLoss):
        exponents.append(-loss.beta * score_gaps(pairs, loss))
    return (torch.stack(exponents).detach() > limit).double().mean(dim=0)
