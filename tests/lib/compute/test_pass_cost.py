"""Rows are cut into passes at the lowest cost by the constants, within the memory bound."""

import itertools
import random

import pytest

from stages.lib.compute.pass_cost import FEWEST_PASSES, PairSize, cheapest_cut, packed_cut, row_cost
from stages.lib.settings.runtime import PassCost


def cost_by_hand(groups: list[list[int]], widths: list[int], cost: PassCost, rows: int) -> float:
    widest = [max(widths[index] for index in group) for group in groups]
    padded = [
        rows * len(group) * (width + width**2 / cost.attention) for group, width in zip(groups, widest, strict=True)
    ]
    return sum(padded) + cost.overhead * len(groups)


def test_padding_is_taken_until_it_costs_more_than_a_pass() -> None:
    cost = PassCost(overhead=10, attention=10**9)
    assert cheapest_cut([30, 25, 4, 4], 1000, cost).groups == [[0, 1], [2, 3]]  # 5 of padding; 2 · 21 would be more
    assert cheapest_cut([30, 19, 19], 1000, cost).groups == [[0], [1, 2]]
    assert cheapest_cut([30, 26, 25], 1000, cost).groups == [[0, 1, 2]]
    assert cheapest_cut([30, 26, 25], 1000, cost, rows=2).groups == [[0], [1, 2]]  # twice as much padding
    assert cheapest_cut([30, 25, 4, 4], 1000, cost).cost == pytest.approx(2 * 10 + 2 * 30 + 2 * 4, abs=1e-3)


def test_a_longer_row_pays_for_its_attention() -> None:
    cost = PassCost(overhead=10, attention=30)
    assert row_cost(30, cost) == 60
    assert cheapest_cut([30, 25], 1000, cost).groups == [[0], [1]]  # padding from 25 to 30 costs 60 − 25 · (1 + 25/30)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("budget", [1, 40, 100, 1000])
def test_no_cut_of_the_sorted_rows_is_cheaper_within_the_budget(rows: int, budget: int) -> None:
    generator = random.Random(budget + rows)
    for _ in range(20):
        widths = [generator.randrange(1, 40) for _ in range(8)]
        cost = PassCost(overhead=generator.randrange(1, 60), attention=generator.randrange(10, 200))
        found = cheapest_cut(widths, budget, cost, rows)
        assert sorted(index for group in found.groups for index in group) == list(range(8))
        order = sorted(range(8), key=lambda index: (-widths[index], index))
        lowest = min(
            cost_by_hand(cut, widths, cost, rows)
            for places in itertools.chain.from_iterable(itertools.combinations(range(1, 8), n) for n in range(8))
            for cut in [[order[a:b] for a, b in itertools.pairwise((0, *places, 8))]]
            if all(len(group) == 1 or rows * len(group) * widths[group[0]] <= budget for group in cut)
        )
        assert found.cost == pytest.approx(lowest) == pytest.approx(cost_by_hand(found.groups, widths, cost, rows))
        assert all(len(group) == 1 or rows * len(group) * widths[group[0]] <= budget for group in found.groups)


def test_nothing_is_cut_into_nothing() -> None:
    assert cheapest_cut([], 10, FEWEST_PASSES).groups == [] == packed_cut([], 10, FEWEST_PASSES).groups


def test_packed_rows_fill_the_fullest_that_has_room() -> None:
    assert packed_cut([6, 5, 4, 3, 2, 9], 10, FEWEST_PASSES).groups == [[5], [0, 2], [1, 3, 4]]
    assert packed_cut([12, 1], 10, FEWEST_PASSES).groups == [[0], [1]]  # a sequence beyond the budget goes alone


def test_a_packed_row_ends_where_its_attention_costs_more_than_a_pass() -> None:
    cost = PassCost(overhead=4, attention=25)  # cheapest for each token at √100 tokens
    assert packed_cut([5] * 4, 1000, cost).groups == [[0, 1], [2, 3]]
    assert packed_cut([5] * 4, 1000, cost).cost == 2 * (4 + 10 + 100 / 25)
    assert packed_cut([15, 5, 5], 1000, cost).groups == [[0], [1, 2]]  # the longest sets how long rows may be


def test_sizes_of_a_pair() -> None:
    size = PairSize(prompt=10, chosen=3, rejected=5)
    assert (size.longer, size.apart, size.shared) == (15, 28, 19)
