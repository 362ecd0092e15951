import math
from itertools import combinations, product
from statistics import mean

import numpy as np
import pytest

from stages.lib.evaluation.best_of_n import best_of_n, kl_bound


def test_it_is_the_mean_over_all_sets_of_n():
    generator = np.random.default_rng(1)
    rewards, measured = generator.normal(size=(3, 6)), generator.normal(size=(3, 6))
    for n in range(1, 7):
        chosen = [
            mean(measured[prompt][max(some, key=rewards[prompt].item)] for some in combinations(range(6), n))
            for prompt in range(3)
        ]
        assert best_of_n(rewards, measured, n) == pytest.approx(mean(chosen))


def test_equal_rewards_share_what_is_measured():
    """Of rewards 0, 1 and 1 either of the last two is the best of three."""
    assert best_of_n([[0.0, 1.0, 1.0]], [[5.0, 2.0, 4.0]], 3) == pytest.approx(3.0)
    # Sets of two: {0, 1}, {0, 1'}, {1, 1'}.
    assert best_of_n([[0.0, 1.0, 1.0]], [[5.0, 2.0, 4.0]], 2) == pytest.approx((2 + 4 + 3) / 3)


@pytest.mark.parametrize("n", [0, 4])
def test_there_must_be_so_many_samples(n):
    with pytest.raises(ValueError, match="expected 1 <= n <= 3 samples"):
        best_of_n([[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]], n)


def test_the_bound_is_met_where_all_outcomes_differ_and_not_exceeded():
    """The KL of best-of-n over equally likely outcomes of distinct rewards; with two outcomes it is far below."""
    for outcomes, n in product((2, 2000), (2, 4, 16)):
        shares = [((i + 1) ** n - i**n) / outcomes**n for i in range(outcomes)]
        kl = sum(share * math.log(share * outcomes) for share in shares if share)
        assert kl <= kl_bound(n)
        if outcomes == 2000:
            assert kl == pytest.approx(kl_bound(n), abs=0.01)
