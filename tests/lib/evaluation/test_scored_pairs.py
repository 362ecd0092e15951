"""Metrics of a reward model on pairs, worked by hand."""

import math

import pytest

from stages.lib.evaluation.intervals import wilson_interval
from stages.lib.evaluation.scored_pairs import (
    ScoredPairs,
    metrics_of_parts,
    pearson,
    quantile_groups,
    reward_model_metrics,
)


def interval(name, right, pairs):
    return dict(zip((f"{name}_ci_low", f"{name}_ci_high"), wilson_interval(right, pairs), strict=True))


def sigmoid(gap):
    return 1 / (1 + math.exp(-gap))


# Gaps 2, 0, -1, 1: two right, a tie. The chosen reply is longer by 3, 0, -1, -2 tokens.
PAIRS = ScoredPairs(
    chosen=[2.0, 1.0, 0.0, 3.0],
    rejected=[0.0, 1.0, 1.0, 2.0],
    chosen_lengths=[5, 2, 3, 4],
    rejected_lengths=[2, 2, 4, 6],
    margins=[0.5, None, 2.0, 1.0],
)


def test_accuracy_calibration_and_length_bias():
    # Confidence of the own pick: σ(2), 0.5, σ(1), σ(1), in three bins; the last holds a right and a wrong pick, and the
    # tie is right by half.
    gaps = [abs(1 - sigmoid(2)), 0.0, abs(1 - 2 * sigmoid(1))]
    # Scores 2 1 0 3 0 1 1 2 (mean 1.25), lengths 5 2 3 4 2 2 4 6 (mean 3.5): Σ of products 42 - 8 · 1.25 · 3.5 = 7, of
    # squares 20 - 12.5 = 7.5 and 114 - 98 = 16.
    assert reward_model_metrics(PAIRS) == pytest.approx(
        {
            "accuracy": 2.5 / 4,
            **interval("accuracy", 2.5, 4),
            "calibration_error": sum(gaps) / 4,
            "margin_mean": 0.5,
            "length_correlation": 7 / math.sqrt(7.5 * 16),
            "length_baseline_accuracy": 1.5 / 4,  # right once, a tie
            **interval("length_baseline_accuracy", 1.5, 4),
            "pairs": 4,
        }
    )


def test_without_a_difference_in_length_there_is_no_correlation():
    alike = ScoredPairs(PAIRS.chosen, PAIRS.rejected, [3] * 4, [3] * 4, [None] * 4)
    found = reward_model_metrics(alike)
    assert "length_correlation" not in found
    assert found["length_baseline_accuracy"] == 0.5


def test_swapped_replies_give_the_mirror_image():
    mirrored = ScoredPairs(PAIRS.rejected, PAIRS.chosen, PAIRS.rejected_lengths, PAIRS.chosen_lengths, PAIRS.margins)
    found, swapped = reward_model_metrics(PAIRS), reward_model_metrics(mirrored)
    assert swapped["accuracy"] == pytest.approx(1 - found["accuracy"])
    assert swapped["margin_mean"] == -found["margin_mean"]
    assert swapped["length_baseline_accuracy"] == pytest.approx(1 - found["length_baseline_accuracy"])
    assert swapped["length_correlation"] == pytest.approx(found["length_correlation"])


def part(name, right, pairs, **others):
    beside = {f"{name}_{key}": value for key, value in others.items()}
    accuracy = {f"{name}_accuracy": right / pairs, **interval(f"{name}_accuracy", right, pairs)}
    return {**accuracy, f"{name}_pairs": pairs, **beside}


def test_the_accuracy_in_parts():
    assert metrics_of_parts(PAIRS) == pytest.approx(
        {
            **part("reliability_50", 0.5, 1, confidence=0.5),
            **part("reliability_80", 1, 2, confidence=sigmoid(1)),
            **part("reliability_90", 1, 1, confidence=sigmoid(2)),
            **part("length_difference_1", 1, 1, mean=-2),
            **part("length_difference_2", 0, 1, mean=-1),
            **part("length_difference_3", 0.5, 1, mean=0),
            **part("length_difference_4", 1, 1, mean=3),
            # Quarters of 0.5, 1 and 2 end at 0.75, 1 and 1.5; nothing lies between the second and the third.
            **part("data_margin_1", 1, 1, mean=0.5),
            **part("data_margin_2", 1, 1, mean=1.0),
            **part("data_margin_3", 0, 1, mean=2.0),
        }
    )


def test_pairs_without_margins_have_no_parts_by_them():
    found = metrics_of_parts(ScoredPairs([1.0], [0.0], [2], [1], [None]))
    assert found["length_difference_1_pairs"] == 1
    assert not any(name.startswith("data_margin") for name in found)


def test_scores_far_apart_are_certain():
    found = metrics_of_parts(ScoredPairs([1e4, -1e4], [-1e4, 1e4], [1, 1], [2, 2], [None] * 2))
    assert found["reliability_100_confidence"] == 1.0
    assert found["reliability_100_accuracy"] == 0.5


def test_groups_are_of_about_the_same_size_and_keep_equal_values_together():
    assert quantile_groups([5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 7.0, 8.0], 4) == [[1, 3], [2, 4], [0, 5], [6, 7]]
    assert quantile_groups([1.0, 1.0, 1.0, 1.0], 4) == [[0, 1, 2, 3]]
    assert quantile_groups([1.0, 2.0, 1.0, 2.0, 1.0, 2.0], 4) == [[0, 2, 4], [1, 3, 5]]
    assert quantile_groups([1.0, 2.0, 3.0, 4.0, 5.0], 4) == [[0, 1], [2], [3], [4]]  # 2, 3 and 4 are the edges
    assert quantile_groups([], 4) == []


def test_correlations_by_hand():
    assert pearson([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1.0)
    assert pearson([1.0, 2.0, 3.0], [3.0, 1.0, -1.0]) == pytest.approx(-1.0)
    # Deviations -1 0 1 and -1 1 0: 1 / √(2 · 2).
    assert pearson([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]) == pytest.approx(0.5)
    assert pearson([1.0, 1.0], [1.0, 2.0]) is None
