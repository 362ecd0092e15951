"""The constants that a machine's times say are found again."""

import pytest

from benchmarks.pass_cost import SHAPES, fitted


def test_constants_are_found_in_times_made_of_them() -> None:
    seconds = {(rows, width): 3e-4 * (90 + rows * width * (1 + width / 1500)) for rows, width in SHAPES}
    cost = fitted(seconds)
    assert (cost.overhead, cost.attention) == (90, 1500)


def test_attention_that_costs_nothing_has_no_limit() -> None:
    cost = fitted({(rows, width): 3e-4 * (90 + rows * width) - 1e-12 * rows * width**2 for rows, width in SHAPES})
    assert cost.overhead == pytest.approx(90, abs=1)
    assert cost.attention == 10**9
