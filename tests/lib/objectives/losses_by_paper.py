"""Every preference loss written once more from its paper, with 150 digits and without a thought for overflow.

Each takes the log-probs of n pairs as lists of numbers and returns the sum of the losses of all pairs. Logarithms and
exponentials are written out as the papers write them; only the limits of exponents are ours.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mpmath import exp, log, mp, mpf

mp.dps = 150
STEP = mpf(10) ** -20  # of a central difference: exact to 40 digits


class Numbers(NamedTuple):
    """Sums of log-probs under policy and reference, and lengths, of the chosen and rejected replies of n pairs."""

    chosen: list[Any]
    rejected: list[Any]
    reference_chosen: list[Any]
    reference_rejected: list[Any]
    chosen_lengths: list[int]
    rejected_lengths: list[int]
    shift: Any = mpf(0)

    @property
    def deltas(self) -> list[tuple[Any, Any]]:
        return [(c - c0, r - r0) for c, r, c0, r0 in zip(*self[:4], strict=True)]


def logistic(x: Any) -> Any:
    return 1 / (1 + exp(-x))


def minus_log_sigma(x: Any) -> Any:
    """log(1 + e^−x)"""
    return log(1 + exp(-x))


def derivative_of_f(u: Any, divergence: Any) -> Any:
    """f′(u), of the generators of Table 1 of arXiv 2309.16240, u = π/π_ref."""
    kind = divergence.type
    if kind == "reverse_kl":  # f = u log u
        return log(u) + 1
    if kind == "forward_kl":  # f = − log u
        return -1 / u
    if kind == "js":  # f = u log u − (u + 1) log((u + 1) / 2)
        return log(2 * u / (1 + u))
    alpha = mpf(divergence.alpha)  # f = (u^(1−α) − (1−α) u − α) / (α (α − 1)), whose f′ is (1 − u^−α) / α
    return (1 - u**-alpha) / alpha


def score(delta: Any, divergence: Any, limit: int) -> Any:
    """f′(e^Δ) − f′(1), where e^−aΔ is held at e^limit."""
    rate = {"forward_kl": 1, "alpha": getattr(divergence, "alpha", 0)}.get(divergence.type, 0)
    if rate and -rate * delta > limit:
        delta = mpf(-limit) / mpf(rate)
    return derivative_of_f(exp(delta), divergence) - derivative_of_f(mpf(1), divergence)


def gaps(n: Numbers, settings: Any, limit: int = 80) -> list[Any]:
    return [score(c, settings.divergence, limit) - score(r, settings.divergence, limit) for c, r in n.deltas]


def mean_gaps(n: Numbers, settings: Any, limit: int = 80) -> list[Any]:
    lengths = zip(n.chosen_lengths, n.rejected_lengths, strict=True)
    return [
        score(c, settings.divergence, limit) / own - score(r, settings.divergence, limit) / other
        for (c, r), (own, other) in zip(n.deltas, lengths, strict=True)
    ]


def sigmoid(n: Numbers, s: Any) -> Any:
    b, e = mpf(s.beta), mpf(s.label_smoothing)
    return sum((1 - e) * minus_log_sigma(b * h) + e * minus_log_sigma(-b * h) for h in gaps(n, s))


def robust(n: Numbers, s: Any) -> Any:
    b, e = mpf(s.beta), mpf(s.flip_rate)
    return sum(((1 - e) * minus_log_sigma(b * h) - e * minus_log_sigma(-b * h)) / (1 - 2 * e) for h in gaps(n, s))


def exo_pair(n: Numbers, s: Any) -> Any:
    b, e = mpf(s.beta), mpf(s.label_smoothing)
    return sum(
        logistic(b * h) * (-minus_log_sigma(b * h) - log(1 - e))
        + logistic(-b * h) * (-minus_log_sigma(-b * h) - log(e))
        for h in gaps(n, s)
    )


def hinge(n: Numbers, s: Any) -> Any:
    return sum(max(mpf(0), 1 - mpf(s.beta) * h) for h in gaps(n, s))


def ipo(n: Numbers, s: Any) -> Any:
    found = gaps(n, s, 40) if s.over_tokens == "sum" else mean_gaps(n, s, 40)
    return sum((h - 1 / (2 * mpf(s.beta))) ** 2 for h in found)


def bco_pair(n: Numbers, s: Any) -> Any:
    b = mpf(s.beta)
    return sum(minus_log_sigma(b * c - n.shift) + minus_log_sigma(-(b * r - n.shift)) for c, r in n.deltas)


def sppo_hard(n: Numbers, s: Any) -> Any:
    eta = 1 / mpf(s.beta)  # Eq. 4.7: log-ratios drawn to η (P − 1/2), P = 1 for the winner and 0 for the loser
    return sum((c - eta * (1 - mpf("0.5"))) ** 2 + (r - eta * (0 - mpf("0.5"))) ** 2 for c, r in n.deltas)


def nca_pair(n: Numbers, s: Any) -> Any:
    b = mpf(s.beta)
    return sum(minus_log_sigma(b * c) + (minus_log_sigma(-b * c) + minus_log_sigma(-b * r)) / 2 for c, r in n.deltas)


def sorted_logistic(above: Sequence[Any], below: Sequence[Any], s: Any) -> Any:
    b, e = mpf(s.beta), mpf(s.label_smoothing)
    differences = [one - other for one, other in zip(sorted(above), sorted(below), strict=True)]
    return sum((1 - e) * minus_log_sigma(b * d) + e * minus_log_sigma(-b * d) for d in differences)


def aot(n: Numbers, s: Any) -> Any:
    policy = [c - r for c, r in zip(n.chosen, n.rejected, strict=True)]
    reference = [c - r for c, r in zip(n.reference_chosen, n.reference_rejected, strict=True)]
    return sorted_logistic(policy, reference, s)


def aot_unpaired(n: Numbers, s: Any) -> Any:
    chosen, rejected = zip(*n.deltas, strict=True)
    return sorted_logistic(chosen, rejected, s)


def apo_zero(n: Numbers, s: Any) -> Any:
    b = mpf(s.beta)
    return sum(1 - logistic(b * c) + logistic(b * r) for c, r in n.deltas)


def apo_down(n: Numbers, s: Any) -> Any:
    b = mpf(s.beta)
    return sum(logistic(b * c) + 1 - logistic(b * (c - r)) for c, r in n.deltas)


def discopop(n: Numbers, s: Any) -> Any:
    total = mpf(0)
    for h in gaps(n, s):
        z = mpf(s.beta) * h
        m = logistic(z / mpf(s.blend_temperature))
        total += (1 - m) * minus_log_sigma(z) + m * exp(min(-z, mpf(80)))
    return total


def sigmoid_norm(n: Numbers, s: Any) -> Any:
    return sum(minus_log_sigma(mpf(s.beta) * h) for h in mean_gaps(n, s))


def sft(n: Numbers, _s: Any = None) -> Any:
    """n times the mean over tokens, since the caller divides by n."""
    return -sum(n.chosen) / sum(n.chosen_lengths) * len(n.chosen)


def mean_logps(n: Numbers) -> list[tuple[Any, Any]]:
    columns = zip(n.chosen, n.rejected, n.chosen_lengths, n.rejected_lengths, strict=True)
    return [(c / own, r / other) for c, r, own, other in columns]


def simpo(n: Numbers, s: Any) -> Any:
    return sum(minus_log_sigma(mpf(s.beta) * (c - r) - mpf(s.target_margin)) for c, r in mean_logps(n))


def cpo(n: Numbers, s: Any) -> Any:
    of_pairs = sum(minus_log_sigma(mpf(s.beta) * (c - r)) for c, r in zip(n.chosen, n.rejected, strict=True))
    return of_pairs + mpf(s.sft_weight) * sft(n)


def orpo(n: Numbers, s: Any) -> Any:
    total = sft(n)
    for both in mean_logps(n):
        odds = [exp(min(p, mpf(-1e-7))) / (1 - exp(min(p, mpf(-1e-7)))) for p in both]
        total -= mpf(s.odds_weight) * log(logistic(log(odds[0] / odds[1])))
    return total


FUNCTIONS = (sigmoid, robust, exo_pair, hinge, ipo, bco_pair, sppo_hard, nca_pair, aot, aot_unpaired)
FUNCTIONS += (apo_zero, apo_down, discopop, sigmoid_norm, sft, simpo, cpo, orpo)
BY_PAPER: dict[str, Callable[[Numbers, Any], Any]] = {function.__name__: function for function in FUNCTIONS}


def gradient(numbers: Numbers, settings: Any) -> tuple[list[Any], list[Any]]:
    """∂/∂ log π of each chosen and of each rejected reply, by central differences."""
    loss = BY_PAPER[settings.type]

    def slope(field: str, place: int) -> Any:
        values = getattr(numbers, field)
        moved = [[*values[:place], values[place] + step, *values[place + 1 :]] for step in (STEP, -STEP)]
        up, down = (loss(numbers._replace(**{field: own}), settings) for own in moved)
        return (up - down) / (2 * STEP)

    places = range(len(numbers.chosen))
    return [slope("chosen", place) for place in places], [slope("rejected", place) for place in places]
