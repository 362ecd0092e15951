"""From the pass rates of prompts to those that are kept, and to a random control of as many."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class RateBounds(Protocol):
    """What `chosen_prompts` reads of a section of params.yaml."""

    @property
    def keep_from(self) -> float: ...

    @property
    def keep_to(self) -> float: ...


class ChosenPrompts(NamedTuple):
    """Places of prompts, in ascending order."""

    kept: list[int]
    control: list[int]  # as many, drawn from all, whatever their pass rates
    too_hard: list[int]
    too_easy: list[int]


def pass_rate(rewards: Sequence[float], passes_above: float) -> float:
    """The share of a prompt's responses whose reward is above a threshold."""
    return sum(reward > passes_above for reward in rewards) / len(rewards)


def chosen_prompts(rates: Sequence[float], settings: RateBounds, seed: int) -> ChosenPrompts:
    """Which prompts are neither too hard nor too easy, and the control, which tells what the filter is worth."""
    too_hard = [place for place, rate in enumerate(rates) if rate < settings.keep_from]
    too_easy = [place for place, rate in enumerate(rates) if rate > settings.keep_to]
    kept = sorted({*range(len(rates))}.difference(too_hard, too_easy))
    return ChosenPrompts(kept, drawn_places(len(rates), len(kept), seed, "control"), too_hard, too_easy)


DRAWS = {"prompts": 0, "control": 1}


def drawn_places(rows: int, count: int, seed: int, what: str) -> list[int]:
    """`count` different places of `rows`, ascending; each of `DRAWS` has random numbers of its own."""
    numbers = np.random.Generator(np.random.Philox(key=[seed, DRAWS[what]], counter=[0, 0, 0, 2]))
    return sorted(int(place) for place in numbers.permutation(rows)[:count])
