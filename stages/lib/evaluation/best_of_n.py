"""What choosing by reward alone would come to: unbiased estimates of best-of-n, for every n from one set of samples."""

import math
from collections.abc import Sequence

import numpy as np


def best_of_n(
    rewards: Sequence[Sequence[float]] | np.ndarray, measured: Sequence[Sequence[float]] | np.ndarray, n: int
) -> float:
    """The mean over prompts of what is measured on the best of n samples by reward.

    Σ_i C(i − 1, n − 1) / C(N, n) m_(i)   over a prompt's N samples in rising order of reward: the mean over all sets of
    n of them, where the i-th is the best of C(i − 1, n − 1) (arXiv 2112.09332, appendix I).

    Args:
        rewards: of N samples of each prompt, (prompts, N).
        measured: of the same samples; the rewards themselves, or another measure. Samples of one reward share theirs.
    Raises:
        ValueError: not 1 ≤ n ≤ N.
    """
    rewards, measured = (np.asarray(values, dtype=np.float64) for values in (rewards, measured))
    count = rewards.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"expected 1 <= n <= {count} samples, found {n}")
    whole = math.comb(count, n)
    weights = np.array([math.comb(place, n - 1) / whole for place in range(count)])
    return float(np.mean([weights @ in_rising_order(*prompt) for prompt in zip(rewards, measured, strict=True)]))


def in_rising_order(rewards: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """What is measured, by rising reward; where rewards are equal, their mean, since either may be chosen."""
    values, group = np.unique(rewards, return_inverse=True)
    means = np.bincount(group, weights=measured) / np.bincount(group)
    return np.repeat(means, np.bincount(group, minlength=len(values)))


def kl_bound(n: int) -> float:
    """log n − (n − 1) / n: an upper bound on the KL of best-of-n to what it samples, in nats (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n
