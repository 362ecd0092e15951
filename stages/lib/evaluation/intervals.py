"""How sure a measurement on held-out prompts is: confidence intervals, calibration, diversity."""

import math
from collections.abc import Hashable, Iterable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927, JASA 22:209-212).

        (p + z^2 / 2n  ±  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),   p = successes / n

    Args:
        successes: between 0 and n; may be fractional, since a tie counts half (the interval is then a little too
            wide: a half has less variance than the formula takes it to have).
        n: trials, at least 1.
        confidence: two-sided, in (0, 1).
    Returns:
        (low, high), within [0, 1].
    Raises:
        ValueError: n below 1, successes outside [0, n].
    """
    if n < 1:
        raise ValueError(f"an interval needs at least one trial, found n = {n}")
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be between 0 and {n}, found {successes}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    proportion = successes / n
    centre = proportion + z * z / (2 * n)
    half_width = z * math.sqrt(proportion * (1 - proportion) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else (centre - half_width) / scale
    high = 1.0 if successes == n else (centre + half_width) / scale
    return low, high


def paired_bootstrap_interval(
    differences: Sequence[float] | np.ndarray, seed: int, resamples: int = 2000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of paired differences (Efron and Tibshirani 1993, chapter 13).

    Prompts are drawn with replacement, and each brings its difference whole: that is what makes it paired, and much
    narrower than two independent intervals where prompts differ in difficulty.

    Args:
        differences: one number a prompt, ours minus theirs on the same prompt, (n,).
        seed: of the draws; the same seed gives the same interval.
    Returns:
        (low, high).
    Raises:
        ValueError: no differences, or one that is no finite number.
    """
    differences = np.asarray(differences, dtype=np.float64)
    if differences.size == 0:
        raise ValueError("an interval needs at least one difference")
    if not np.isfinite(differences).all():
        raise ValueError("a difference is not a finite number")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for resample in range(resamples):
        means[resample] = differences[generator.integers(differences.size, size=differences.size)].mean()
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


class ReliabilityBin(NamedTuple):
    """Predictions with about the same probability."""

    upper: float  # the bin's end; it starts 1 / bins below
    count: int
    probability: float  # their mean
    outcome: float  # the mean of what happened


def reliability_bins(
    probabilities: Sequence[float] | np.ndarray, outcomes: Sequence[float] | np.ndarray, bins: int = 10
) -> list[ReliabilityBin]:
    """The reliability curve of predictions (arXiv 1706.04599, section 2): the bins in which there are any.

    Bins are of equal width over [0, 1], closed above and open below (but for 0).

    Args:
        probabilities: predicted, in [0, 1], (n,).
        outcomes: 1 where it happened, 0 where not, (n,).
    Raises:
        ValueError: nothing given, unequal lengths, a probability outside [0, 1].
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    outcomes = np.asarray(outcomes, dtype=np.float64)
    if probabilities.size == 0 or probabilities.shape != outcomes.shape:
        raise ValueError(f"expected as many outcomes as probabilities, found {outcomes.size} and {probabilities.size}")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("a probability is outside [0, 1]")
    bin_of = np.clip(np.ceil(probabilities * bins).astype(int) - 1, 0, bins - 1)
    found = []
    for number in np.unique(bin_of).tolist():
        inside = bin_of == number
        means = float(probabilities[inside].mean()), float(outcomes[inside].mean())
        found.append(ReliabilityBin((number + 1) / bins, int(inside.sum()), *means))
    return found


def calibration_error(
    probabilities: Sequence[float] | np.ndarray, outcomes: Sequence[float] | np.ndarray, bins: int = 10
) -> float:
    """Expected calibration error: sum over bins of |bin| / n * |mean outcome - mean probability|.

    Source: arXiv 1706.04599, Eq 3. Arguments and errors as of `reliability_bins`.
    """
    parts = reliability_bins(probabilities, outcomes, bins)
    return sum(part.count * abs(part.outcome - part.probability) for part in parts) / len(probabilities)


def distinct_n(token_sequences: Iterable[Sequence[Hashable]], n: int) -> float:
    """Different n-grams over all n-grams of a set of responses (Li et al., arXiv 1510.03055, section 4).

    Counted over the whole set, not averaged over responses, so a set of equal responses scores low. It falls as a set
    grows: compare sets of the same size only. 0.0 where no response has n tokens.
    """
    seen: set[tuple[Hashable, ...]] = set()
    total = 0
    for sequence in token_sequences:
        grams = [tuple(sequence[start : start + n]) for start in range(len(sequence) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0
