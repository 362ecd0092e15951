import math

import numpy as np
import pytest

from stages.lib.evaluation.intervals import (
    calibration_error,
    distinct_n,
    paired_bootstrap_interval,
    reliability_bins,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # z = 1.959964, z^2 = 3.841459. 8 of 10: centre 0.8 + 3.841459 / 20 = 0.992073, half width
        # 1.959964 * sqrt(0.016 + 3.841459 / 400) = 0.313583, scale 1.384146: (0.678490, 1.305656) / 1.384146
        (8, 10, 0.490189, 0.943294),
        # 0 of 10: (0, z^2 / (n + z^2)) = (0, 3.841459 / 13.841459)
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        # 1 of 2: 0.5 ± z sqrt(0.125 + 3.841459 / 16) / 2.920730 = 0.5 ± 0.405469
        (1, 2, 0.094531, 0.905469),
        # 7.5 of 10 (a tie): centre 0.942073, half width 1.959964 * sqrt(0.01875 + 0.009604) = 0.330029
        (7.5, 10, 0.442181, 0.919052),
    ],
)
def test_wilson_by_hand(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_bounds_solve_the_score_equation():
    # The definition: both bounds q satisfy |p - q| = z sqrt(q (1 - q) / n), here at 90 %, z = 1.644854.
    for bound in wilson_interval(37, 120, confidence=0.9):
        assert abs(37 / 120 - bound) == pytest.approx(1.644854 * math.sqrt(bound * (1 - bound) / 120), rel=1e-5)


def test_wilson_is_symmetric_and_exact_at_the_ends():
    low, high = wilson_interval(13, 40)
    assert wilson_interval(27, 40) == pytest.approx((1 - high, 1 - low))
    for n in range(1, 60):
        assert wilson_interval(0, n)[0] == 0.0
        assert wilson_interval(n, n)[1] == 1.0


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (5, 4), (-1, 4), (math.nan, 4)])
def test_wilson_refuses_what_is_no_proportion(successes, n):
    with pytest.raises(ValueError, match=r"trial|successes"):
        wilson_interval(successes, n)


def test_bootstrap_of_two_differences_by_hand():
    # Resamples of (0, 1) have mean 0, 1/2 or 1 with probability 1/4, 1/2, 1/4: the 2.5 and 97.5 % quantiles are 0 and
    # 1, the 30 and 70 % quantiles 1/2. Drawing without replacement would always give 1/2.
    assert paired_bootstrap_interval([0.0, 1.0], seed=0) == (0.0, 1.0)
    assert paired_bootstrap_interval([0.0, 1.0], seed=0, confidence=0.4) == (0.5, 0.5)


def test_bootstrap_agrees_with_the_normal_interval_for_many_differences():
    differences = np.random.default_rng(1).normal(0.3, 2.0, size=400)
    low, high = paired_bootstrap_interval(differences, seed=3)
    error = differences.std() / math.sqrt(400)
    assert low == pytest.approx(differences.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(differences.mean() + 1.96 * error, abs=0.15 * error)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    # 200 intervals at 80 %: 160 expected, standard deviation 5.7.
    generator = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        low, high = paired_bootstrap_interval(generator.normal(1.0, 1.0, 50), trial, resamples=200, confidence=0.8)
        covered += low <= 1.0 <= high
    assert 140 <= covered <= 180


def test_bootstrap_depends_on_nothing_but_the_seed():
    differences = np.random.default_rng(1).normal(size=30)
    np.random.seed(0)
    first = paired_bootstrap_interval(differences, seed=3)
    np.random.seed(1)
    assert paired_bootstrap_interval(list(differences), seed=3) == first
    assert paired_bootstrap_interval(differences, seed=4) != first


def test_bootstrap_of_a_policy_against_itself_is_zero():
    assert paired_bootstrap_interval([0.0] * 8, seed=0) == (0.0, 0.0)


@pytest.mark.parametrize("differences", [[], [1.0, math.nan], [math.inf]])
def test_bootstrap_refuses_what_has_no_mean(differences):
    with pytest.raises(ValueError, match="difference"):
        paired_bootstrap_interval(differences, seed=0)


def test_calibration_error_by_hand():
    # bin of 0.15: two, mean outcome 1/2, gap 0.35; bin of 0.85: two, mean outcome 1, gap 0.15: (0.35 + 0.15) / 2
    assert calibration_error([0.15, 0.15, 0.85, 0.85], [0, 1, 1, 1]) == pytest.approx(0.25)
    # unequal bins weigh by their size: 3/4 * |0.15 - 1/3| + 1/4 * |0.85 - 1| = 0.1375 + 0.0375
    assert calibration_error([0.15, 0.15, 0.15, 0.85], [0, 0, 1, 1]) == pytest.approx(0.175)


def test_reliability_bins_by_hand():
    # (0.1, 0.2] holds 0.15, 0.2 and 0.15, of which one happened; (0.8, 0.9] holds 0.85 and 0.9, of which one and a half
    # did.
    low, high = reliability_bins([0.85, 0.15, 0.2, 0.15, 0.9], [1, 0, 1, 0, 0.5])
    assert low == pytest.approx((0.2, 3, 0.5 / 3, 1 / 3))
    assert high == pytest.approx((0.9, 2, 0.875, 0.75))
    assert calibration_error([0.85, 0.15, 0.2, 0.15, 0.9], [1, 0, 1, 0, 0.5]) == pytest.approx((0.5 + 0.25) / 5)


def test_calibration_errors_of_different_bins_do_not_cancel():
    # Each is wrong by 0.75, in opposite directions; pooled, the error would be 0.
    assert calibration_error([0.25, 0.75], [1, 0]) == pytest.approx(0.75)
    assert calibration_error([0.25, 0.75], [1, 0], bins=1) == pytest.approx(0.0)


def test_calibration_bins_are_closed_above():
    # Two bins: 0.5 belongs with 0.4: |(1 - 0.5) + (0 - 0.4)| / 2 = 0.05; apart it would be (0.5 + 0.4) / 2 = 0.45.
    assert calibration_error([0.5, 0.4], [1, 0], bins=2) == pytest.approx(0.05)
    assert calibration_error([0.0, 1.0], [0, 1]) == 0.0
    assert calibration_error([0.0, 1.0], [1, 0]) == 1.0


def test_outcomes_drawn_from_the_probabilities_are_calibrated():
    generator = np.random.default_rng(0)
    probabilities = generator.random(20_000)
    outcomes = generator.random(20_000) < probabilities
    assert calibration_error(probabilities, outcomes) < 0.015
    assert calibration_error(np.clip(probabilities * 1.5, 0, 1), outcomes) > 0.1


@pytest.mark.parametrize(("probabilities", "outcomes"), [([], []), ([0.5], [1, 0]), ([1.2], [1]), ([math.nan], [1])])
def test_calibration_refuses_what_are_no_probabilities(probabilities, outcomes):
    with pytest.raises(ValueError, match="probabilit"):
        calibration_error(probabilities, outcomes)


def test_distinct_n_by_hand():
    # 1 2 1 2 | 1 2: unigrams 2 of 6; bigrams 12, 21, 12 and 12: 2 of 4 (none across responses); trigrams 2 of 2
    # Averaged over responses, unigrams would give (2/4 + 2/2) / 2 = 0.75.
    responses = [[1, 2, 1, 2], [1, 2]]
    assert distinct_n(responses, 1) == pytest.approx(1 / 3)
    assert distinct_n(responses, 2) == 0.5
    assert distinct_n(responses, 3) == 1.0
    assert distinct_n(responses, 5) == 0.0
    assert distinct_n(iter([np.array([1, 2, 1, 2]), np.array([1, 2])]), 2) == 0.5
