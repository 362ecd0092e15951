"""What training again with other seeds says of a metric: its mean over seeds with Student's interval."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import t


class SeedMean(NamedTuple):
    """mean ± half_width covers the mean over all seeds with a confidence of 95 %."""

    mean: float
    half_width: float | None  # None: of one seed

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.half_width is None else f"{self.mean:.2f} ± {self.half_width:.2f}"


def seed_mean(values: Sequence[float], confidence: float = 0.95) -> SeedMean:
    """mean ± t s / √n with n − 1 degrees of freedom (Student, The probable error of a mean, 1908).

    Args:
        values: one for each seed, at least one.
    """
    if len(values) < 2:
        return SeedMean(statistics.fmean(values), None)
    quantile = float(t.ppf((1 + confidence) / 2, len(values) - 1))
    return SeedMean(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values)))
