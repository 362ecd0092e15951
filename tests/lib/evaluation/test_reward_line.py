import math
import random
import statistics

import pytest

from stages.lib.evaluation.reward_line import residual_metrics

# u = 1 + 2 r on the pairs, with deviations that change neither slope nor intercept.
REWARDS = {"chosen": [1.0, 0.0], "rejected": [-1.0, 0.0]}
MEASURED = {"chosen": [3.0, 1.5], "rejected": [-1.0, 0.5]}


def residual(replies, rewards=REWARDS, measured=MEASURED, **changed):
    return residual_metrics("gold", replies, rewards, measured, **({"resamples": 200, "seed": 1} | changed))


def test_the_residual_by_hand():
    """At a mean reward of 1 the line says 3, and the policy's replies have 2 and 2.5."""
    found = residual([(0.5, 2.0), (1.5, 2.5)])
    assert found["gold_residual_mean"] == pytest.approx(2.25 - 3)
    assert (found["gold_line_slope"], found["gold_line_intercept"]) == (pytest.approx(2), pytest.approx(1))
    # covariance 4 over both deviations: √2 and √(4 + 4 + 0.25 + 0.25)
    assert found["gold_line_correlation"] == pytest.approx(4 / math.sqrt(2 * 8.5))
    assert found["gold_line_pairs"] == 2


def test_replies_and_pairs_without_a_grade_do_not_count():
    rewards = {"chosen": [*REWARDS["chosen"], 9.0], "rejected": [*REWARDS["rejected"], 9.0]}
    measured = {"chosen": [*MEASURED["chosen"], 7.0], "rejected": [*MEASURED["rejected"], None]}
    with_others = residual([(0.5, 2.0), (8.0, None), (1.5, 2.5)], rewards, measured)
    assert with_others == residual([(0.5, 2.0), (1.5, 2.5)])
    assert residual([(0.5, None)]) == {}
    assert residual([(0.5, 2.0)], measured={"chosen": [None, None], "rejected": [1.0, 2.0]}) == {}


@pytest.mark.parametrize("flat", ["rewards", "measured"])
def test_without_variance_there_is_no_line(flat):
    same = {"chosen": [0.3, 0.3], "rejected": [0.3, 0.3]}
    assert residual([(0.5, 2.0)], **{flat: same}) == {}


def test_the_interval_covers_prompts_and_line():
    """Its width is that of repeating the whole measurement with other prompts and other pairs."""

    def draw(generator, pairs=60, prompts=40):
        sides = ("chosen", "rejected")
        rewards = {side: [generator.gauss(0, 1) for _ in range(pairs)] for side in sides}
        measured = {side: [2 * r + generator.gauss(0, 1) for r in rewards[side]] for side in sides}
        replies = [(r, 2 * r + generator.gauss(-1, 1)) for r in (generator.gauss(2, 0.5) for _ in range(prompts))]
        return residual(replies, rewards, measured, resamples=300)

    generator = random.Random(3)
    means = [draw(generator)["gold_residual_mean"] for _ in range(300)]
    found = draw(generator)
    width = found["gold_residual_ci_high"] - found["gold_residual_ci_low"]
    assert statistics.mean(means) == pytest.approx(-1, abs=0.05)
    assert width == pytest.approx(2 * 1.96 * statistics.stdev(means), rel=0.25)
    # Prompts alone, whose residuals deviate by 1, would give an interval a fifth narrower.
    assert statistics.stdev(means) > 1.15 / math.sqrt(40)
