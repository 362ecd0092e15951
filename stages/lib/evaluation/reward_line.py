"""Over-optimisation: how far a policy lies from the line that relates reward to a better measure on held-out replies.

Replies that nothing has selected by their reward give the line  u ≈ a + b r  by least squares. Choosing among such
replies by reward, as best-of-n does, moves along it; a policy that exploits what the reward model gets wrong lies
below it: the mean of  u − (a + b r)  over its replies, its residual, is negative (arXiv 2210.10760, section 3).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

ROUNDING = 1e-12  # a share of a sum of squares that rounding alone explains


class RewardLine(NamedTuple):
    """u ≈ intercept + slope · r."""

    slope: float
    intercept: float
    correlation: float  # Pearson's, of r and u

    def residual(self, reward: float, measured: float) -> float:
        """u − (a + b r), of one reply or of the means over several."""
        return float(measured - self.intercept - self.slope * reward)


PairValues = Mapping[str, Sequence[float | None]]  # of both replies of each pair, by side; None: there is none


def residual_metrics(
    measure: str,
    replies: Sequence[tuple[float, float | None]],
    rewards: PairValues,
    measured: PairValues,
    resamples: int,
    seed: int,
) -> dict[str, float]:
    """A policy's mean residual with its 95 % interval, and the line; empty where nothing gives one.

    The interval is a percentile bootstrap over the policy's prompts and, as the line is measured, too, over the test
    pairs, whose two replies stay together.

    Args:
        measure: what the names of the metrics begin with.
        replies: reward of each reply of the policy, and what the better measure says of it.
        rewards: of the test pairs.
        measured: of the same pairs, by the better measure.
    """
    own = np.array([reply for reply in replies if reply[1] is not None], dtype=np.float64)
    sums = _sums(rewards, measured)
    if not len(own) or not len(sums) or (line := _line_of(sums.sum(axis=0))) is None:
        return {}
    generator, means = np.random.default_rng(seed), []
    for _ in range(resamples):
        drawn = _line_of(sums[generator.integers(len(sums), size=len(sums))].sum(axis=0))
        some = own[generator.integers(len(own), size=len(own))]
        if drawn is not None:  # a resample of few pairs may be of one alone
            means.append(drawn.residual(*some.mean(axis=0)))
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        f"{measure}_residual_mean": line.residual(*own.mean(axis=0)),
        f"{measure}_residual_ci_low": float(low),
        f"{measure}_residual_ci_high": float(high),
        f"{measure}_line_slope": line.slope,
        f"{measure}_line_intercept": line.intercept,
        f"{measure}_line_correlation": line.correlation,
        f"{measure}_line_pairs": len(sums),
    }


def _sums(rewards: PairValues, measured: PairValues) -> np.ndarray:
    """Of each pair that has all numbers, the sums over its replies of 1, r, u, r², r u and u². Shape: (pairs, 6)."""
    columns = [np.array([*side.values()], dtype=np.float64) for side in (rewards, measured)]
    r, u = (column[:, np.isfinite(columns[1]).all(axis=0)] for column in columns)
    return np.stack([np.ones_like(r), r, u, r * r, r * u, u * u], axis=-1).sum(axis=0)


def _line_of(sums: np.ndarray) -> RewardLine | None:
    """The line of least squares by these sums; None where r or u never varies."""
    n, r, u, rr, ru, uu = sums.tolist()
    covariance, variance, other = ru - r * u / n, rr - r * r / n, uu - u * u / n
    if variance <= ROUNDING * rr or other <= ROUNDING * uu:
        return None
    slope = covariance / variance
    return RewardLine(slope, (u - slope * r) / n, covariance / math.sqrt(variance * other))
