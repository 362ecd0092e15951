"""How rows are cut into forward passes: at the lowest cost by constants of `runtime.yaml`, within its memory bound.

Nothing is timed while a stage runs, or two runs would sum in different orders and differ in bytes. The unit of cost is
the time that one token takes in a pass of many short sequences:

    cost of a pass over n rows, each padded to t tokens  =  overhead + n t (1 + t / attention)
"""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stages.lib.settings.runtime import PassCost

# As few passes as the budget allows, and of such cuts the one that pads least.
FEWEST_PASSES = PassCost(overhead=10**9, attention=10**9)


class Cut(NamedTuple):
    """Groups of rows, each for one pass, and what they cost together."""

    groups: list[list[int]]
    cost: float


class PairSize(NamedTuple):
    """Tokens of a prompt and of the two replies to it."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def longer(self) -> int:
        """Of its two sequences."""
        return self.prompt + max(self.chosen, self.rejected)

    @property
    def apart(self) -> int:
        """Of both sequences."""
        return 2 * self.prompt + self.chosen + self.rejected

    @property
    def shared(self) -> int:
        """Of the row with both replies behind one prompt, whose last token stands before each."""
        return self.prompt + 1 + self.chosen + self.rejected


def row_cost(width: int, cost: PassCost) -> float:
    """Of one row of `width` tokens, padding included, in a pass that there is anyway."""
    return width * (1 + width / cost.attention)


def cheapest_cut(widths: Sequence[int], token_budget: int, cost: PassCost, rows: int = 1) -> Cut:
    """Cut items into padded passes of at most `token_budget` tokens (or of one item) at the lowest total cost.

    Widest first, so that rows of a pass are about as wide: of all ways to cut the sorted items, this one is cheapest.

    Args:
        widths: tokens of each item's widest row.
        rows: of each item, which are padded to one width.
    Returns:
        Indices into `widths`, every index once.
    """
    order = sorted(range(len(widths)), key=lambda index: (-widths[index], index))
    lowest = np.full(len(order) + 1, np.inf)  # cost of the first so many items
    lowest[0] = 0.0
    start = np.zeros(len(order) + 1, dtype=np.int64)  # where the last pass over them begins
    for place, index in enumerate(order):
        most = max(1, token_budget // (rows * widths[index]))
        ends = np.arange(place + 1, min(place + most, len(order)) + 1)
        costs = lowest[place] + cost.overhead + rows * (ends - place) * row_cost(widths[index], cost)
        lower = costs <= lowest[ends]
        lowest[ends[lower]] = costs[lower]
        start[ends[lower]] = place
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[start[end] : end])
        end = int(start[end])
    return Cut(groups[::-1], float(lowest[-1]))


def packed_cut(lengths: Sequence[int], token_budget: int, cost: PassCost) -> Cut:
    """Cut items into passes of one row each, of at most `token_budget` tokens (or of one item), by best fit.

    The kernel computes attention of the whole row, of which only blocks are wanted. This waste and the overhead of a
    pass cost least, for each token, in rows of √(overhead · attention) tokens: none is longer, unless an item is.

    Args:
        lengths: tokens of each item.
    Returns:
        Indices into `lengths`, every index once; groups in the order in which they were opened.
    """
    most = min(token_budget, max(math.isqrt(cost.overhead * cost.attention), *lengths, 1))
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(room, (lengths[index], 0))
        if place < len(room):
            left, group = room.pop(place)
            groups[group].append(index)
        else:
            left, group = most, len(groups)
            groups.append([index])
        insort(room, (left - lengths[index], group))
    return Cut(groups, sum(cost.overhead + row_cost(sum(lengths[row] for row in group), cost) for group in groups))
