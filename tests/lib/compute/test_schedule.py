import itertools
import math
import subprocess
import sys

import pytest

from stages.lib.compute.schedule import learning_rate


def whole(total_steps: int, **settings) -> list[float]:
    defaults = {"peak": 2.0, "warmup_ratio": 0.2, "min_ratio": 0.1}
    return [learning_rate(step, total_steps, **(defaults | settings)) for step in range(total_steps)]


def test_cosine_by_hand():
    # 10 steps, 2 of warm-up, peak 2, floor 0.2: 1, 2, then progress (s - 1) / 8:
    # step 3, p = 1/4: 2 * (0.1 + 0.9 * (1 + 0.707107) / 2) = 1.736396;  step 5, p = 1/2: 2 * 0.55 = 1.1;  step 9: 0.2
    rates = whole(10)
    assert rates[:2] == [1.0, 2.0]
    assert rates[3] == pytest.approx(1.736396, abs=1e-6)
    assert rates[5] == pytest.approx(1.1)
    assert rates[9] == pytest.approx(0.2)
    assert all(earlier > later for earlier, later in itertools.pairwise(rates[1:]))


def test_linear_by_hand():
    # progress 1/4 at step 3: 2 * (0.1 + 0.9 * 3 / 4) = 1.55
    rates = whole(10, kind="linear")
    assert rates[:2] == [1.0, 2.0]
    assert rates[3] == pytest.approx(1.55)
    assert rates[9] == pytest.approx(0.2)


def test_constant_stays_at_the_peak_after_warm_up():
    assert whole(10, kind="constant") == [1.0] + [2.0] * 9


def test_without_warm_up_the_first_step_has_the_peak():
    # 3 steps: p = 0, 1/2, 1
    assert whole(3, warmup_ratio=0.0, min_ratio=0.0) == pytest.approx([2.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("total_steps", "ratio", "warm_up"), [(100, 0.07, 7), (10, 0.15, 2), (1000, 0.001, 1), (30, 0.1, 3)]
)
def test_length_of_the_warm_up(total_steps, ratio, warm_up):
    # 0.07 * 100 = 7.000000000000001: seven steps, not eight; 1.5 is rounded up.
    rates = whole(total_steps, warmup_ratio=ratio)
    assert rates.index(2.0) == warm_up - 1
    assert rates[:warm_up] == pytest.approx([2.0 * (step + 1) / warm_up for step in range(warm_up)])


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_short_runs_have_a_rate_at_every_step(kind, ratio, total_steps):
    rates = whole(total_steps, warmup_ratio=ratio, kind=kind)
    assert max(rates) == 2.0
    assert all(math.isfinite(rate) and rate >= 0.2 for rate in rates)


@pytest.mark.parametrize("step", [-1, 10, 11])
def test_a_step_outside_the_run_is_refused(step):
    with pytest.raises(ValueError, match="outside the 10 steps"):
        learning_rate(step, 10, 1.0, 0.1, 0.1)


def test_an_unknown_kind_is_refused_already_in_the_warm_up():
    with pytest.raises(ValueError, match="cosin"):
        learning_rate(0, 10, 1.0, 0.5, 0.1, kind="cosin")


def test_needs_no_torch():
    code = "import sys, stages.lib.compute.schedule; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
