"""What is measured of a reward model on test pairs: accuracy in all and in parts, calibration, length bias.

Everything is a mean over pairs and lies flat: `<part>_<number>_<metric>` for a part of the pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.lib.evaluation.intervals import calibration_error, reliability_bins, wilson_interval
from stages.lib.evaluation.metrics import Places, above_zero, mean

GROUPS = 4  # parts of about as many pairs each
PER_CENT = 100


@dataclass(frozen=True)
class ScoredPairs:
    """Both replies of each pair: their scores, and what may have to do with them."""

    chosen: Sequence[float]  # score
    rejected: Sequence[float]
    chosen_lengths: Sequence[int]  # tokens of the reply, with its EOS
    rejected_lengths: Sequence[int]
    margins: Sequence[float | None]  # how much better the chosen one is, as the data says; None: it does not

    def of(self, places: Places) -> "ScoredPairs":
        """Some of the pairs."""
        return ScoredPairs(**{name: [values[place] for place in places] for name, values in vars(self).items()})

    @property
    def gaps(self) -> list[float]:
        """r_c − r_r."""
        return [good - bad for good, bad in zip(self.chosen, self.rejected, strict=True)]

    @property
    def length_differences(self) -> list[int]:
        """Of the chosen reply from the rejected one, in tokens."""
        return [good - bad for good, bad in zip(self.chosen_lengths, self.rejected_lengths, strict=True)]


def reward_model_metrics(pairs: ScoredPairs) -> dict[str, float]:
    """Accuracy, calibration and length bias.

    length_correlation: Pearson's, of score and length over all replies; left out where one of them never varies.
    length_baseline_accuracy: of a judge that always takes the longer reply; equal lengths count half.
    """
    correlation = pearson([*pairs.chosen, *pairs.rejected], [*pairs.chosen_lengths, *pairs.rejected_lengths])
    return {
        **above_zero("accuracy", pairs.gaps),
        "calibration_error": calibration_error(*own_picks(pairs.gaps)),
        "margin_mean": mean(pairs.gaps),
        **({} if correlation is None else {"length_correlation": correlation}),
        **above_zero("length_baseline_accuracy", pairs.length_differences),
        "pairs": len(pairs.gaps),
    }


def metrics_of_parts(pairs: ScoredPairs) -> dict[str, float]:
    """The accuracy in parts of the pairs, each with its interval and number of pairs.

    reliability_<p>: where the model gives its own pick a probability of at most p %, and more than p − 10 %.
    length_difference_<n>: quarters by how much longer the chosen reply is, the first those where it is shorter most.
    data_margin_<n>: quarters by the margin that the data gives, of the pairs that have one.
    Where values repeat, parts are fewer than four.
    """
    with_margin = [place for place, margin in enumerate(pairs.margins) if margin is not None]
    of_margins = pairs.of(with_margin)
    margins = [margin for margin in of_margins.margins if margin is not None]
    return (
        reliability(pairs)
        | accuracy_by("length_difference", pairs, pairs.length_differences)
        | accuracy_by("data_margin", of_margins, margins)
    )


def accuracy_by(name: str, pairs: ScoredPairs, values: Sequence[float]) -> dict[str, float]:
    """Of parts of about the same size, by a value of each pair."""
    found: dict[str, float] = {}
    for number, places in enumerate(quantile_groups(values, GROUPS), start=1):
        part = f"{name}_{number}"
        found |= above_zero(f"{part}_accuracy", pairs.of(places).gaps)
        found |= {f"{part}_mean": mean([values[place] for place in places]), f"{part}_pairs": len(places)}
    return found


def quantile_groups(values: Sequence[float], groups: int) -> list[list[int]]:
    """Places in groups of about the same size, in the order of the values; equal values stand in one group.

    Where values repeat there may be fewer groups than asked for; none is empty.
    """
    if not values:
        return []
    edges = np.quantile(values, np.arange(1, groups) / groups)
    group_of = np.searchsorted(edges, values, side="left")
    return [np.flatnonzero(group_of == group).tolist() for group in sorted({*group_of.tolist()})]


def reliability(pairs: ScoredPairs) -> dict[str, float]:
    """The reliability curve: how often the own pick is right, beside how sure the model is of it."""
    found: dict[str, float] = {}
    for part in reliability_bins(*own_picks(pairs.gaps)):
        name = f"reliability_{round(PER_CENT * part.upper)}"
        low, high = wilson_interval(part.count * part.outcome, part.count)
        found |= {f"{name}_confidence": part.probability, f"{name}_accuracy": part.outcome}
        found |= {f"{name}_accuracy_ci_low": low, f"{name}_accuracy_ci_high": high, f"{name}_pairs": part.count}
    return found


def own_picks(gaps: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The probability that the model gives its own pick, σ(|r_c − r_r|), and whether that was the chosen reply.

    The order of a pair's replies is fixed by the label, so the outcome "chosen" says nothing of calibration; that of
    the own pick does. A tie is right by half.
    """
    differences = np.asarray(gaps, dtype=np.float64)
    return 1 / (1 + np.exp(-np.abs(differences))), (np.sign(differences) + 1) / 2


def pearson(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's correlation coefficient, in −1 to 1; None where one of the two never varies."""
    deviations = [
        np.asarray(values, dtype=np.float64) - np.mean(values, dtype=np.float64) for values in (first, second)
    ]
    sizes = [float(np.linalg.norm(deviation)) for deviation in deviations]
    if min(sizes) == 0:
        return None
    units = [deviation / size for deviation, size in zip(deviations, sizes, strict=True)]
    return float(np.clip(units[0] @ units[1], -1.0, 1.0))
