from itertools import combinations
from statistics import mean

import pytest

from stages.lib.evaluation.pass_at_k import pass_at_k, pass_metrics


@pytest.mark.parametrize(("right", "samples"), [(0, 5), (1, 5), (3, 5), (5, 5), (2, 7)])
def test_it_is_the_share_of_subsets_that_hold_a_right_one(right, samples):
    marks = [True] * right + [False] * (samples - right)
    for k in range(1, samples + 1):
        assert pass_at_k(right, samples, k) == pytest.approx(mean(any(chosen) for chosen in combinations(marks, k)))


@pytest.mark.parametrize(("right", "samples", "k"), [(1, 4, 5), (1, 4, 0), (5, 4, 1), (-1, 4, 1)])
def test_wrong_numbers(right, samples, k):
    with pytest.raises(ValueError, match="expected 1 <= k <= samples"):
        pass_at_k(right, samples, k)


def test_means_over_the_prompts_that_a_measure_applies_to():
    scores = {"gold": [[1.0, 0.0, 0.5], [0.0, 0.0, 0.0]], "answer": [[None, None, None], [1.0, 1.0, 0.0]]}
    found = pass_metrics(scores, 0.5, [1, 2], 200, 1)
    assert {name: value for name, value in found.items() if "_ci_" not in name} == pytest.approx(
        {"gold_pass_at_1": 1 / 6, "gold_pass_at_2": 1 / 3, "answer_pass_at_1": 2 / 3, "answer_pass_at_2": 1.0}
    )
    assert (found["gold_pass_at_2_ci_low"], found["gold_pass_at_2_ci_high"]) == (0, pytest.approx(2 / 3))
    assert pass_metrics({"gold": [[None]]}, 0.5, [1], 200, 1) == {}
