import math
import random
import statistics

import pytest

from stages.lib.evaluation.seed_means import seed_mean


def test_by_hand_and_table():
    """Deviation 1 of five values; t of 4 degrees of freedom is 2.776 in every table."""
    values = [10 + shift for shift in (-math.sqrt(2), 0, 0, 0, math.sqrt(2))]
    found = seed_mean(values)
    assert found.mean == pytest.approx(10)
    assert found.half_width == pytest.approx(2.7764 / math.sqrt(5), rel=1e-4)
    assert str(found) == "10.00 ± 1.24"


def test_one_seed_has_no_interval():
    assert str(seed_mean([1.5])) == "1.50"


def test_it_covers_the_mean_as_often_as_it_says():
    generator = random.Random(1)
    found = [seed_mean([generator.gauss(3, 2) for _ in range(4)]) for _ in range(2000)]
    covered = statistics.mean(abs(one.mean - 3) <= one.half_width for one in found)
    assert covered == pytest.approx(0.95, abs=0.015)
