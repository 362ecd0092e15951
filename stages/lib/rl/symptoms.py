"""Signs in the curve of an RL run that it goes wrong, each with its metric and its threshold.

A sign is read off a phase and those before it, so that console and report, which read the same curve, say the same.
README.md says which settings to turn. Under dynamic sampling what is kept has variance and a middling reward by choice,
so what is read of either is that of all groups that were asked.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

UNFILTERED = {
    "objective/scores": "dynamic_sampling/unfiltered_scores",
    "group/without_variance": "dynamic_sampling/unfiltered_without_variance",
}
History = Sequence[Mapping[str, float]]  # of each phase what was measured in it
# Of a phase (1-based), from the phases up to it; None where it says nothing yet.
Measure = Callable[[History, int], float | None]


class Sign(NamedTuple):
    """What is wrong where a measure is beyond its threshold."""

    what: str
    measured: str  # the measure in words, by the names of the curve's columns
    measure: Measure
    threshold: float
    above: bool  # whether the trouble lies above the threshold, rather than at it or below

    @property
    def condition(self) -> str:
        return f"{self.measured} {'above' if self.above else 'at most'} {self.threshold:g}"

    def is_seen_at(self, value: float) -> bool:
        return value > self.threshold if self.above else value <= self.threshold


class Seen(NamedTuple):
    """A sign in a phase, and the value of its measure there."""

    sign: Sign
    value: float

    @property
    def line(self) -> str:
        return f"{self.sign.what}: {self.value:.3g} ({self.sign.condition}); see README.md, When it goes wrong"


def seen_in(history: History, phase: int) -> list[Seen]:
    """The signs of a phase (1-based)."""
    asked = [unfiltered(row) for row in history]
    values = [(sign, sign.measure(asked, phase)) for sign in SIGNS] if phase else []
    return [Seen(sign, value) for sign, value in values if value is not None and sign.is_seen_at(value)]


def new_in(history: History, phase: int) -> list[Seen]:
    """Those that the phase before did not have."""
    before = {seen.sign for seen in seen_in(history, phase - 1)}
    return [seen for seen in seen_in(history, phase) if seen.sign not in before]


def symptoms_of_curve(history: History) -> list[str]:
    """A sentence for each sign that any phase had: in which phases, and how bad it was at its worst."""
    found: dict[Sign, dict[int, float]] = {}
    for phase in range(1, len(history) + 1):
        for seen in seen_in(history, phase):
            found.setdefault(seen.sign, {})[phase] = seen.value
    return [sentence(sign, values, len(history)) for sign, values in found.items()]


def sentence(sign: Sign, found: Mapping[int, float], phases: int) -> str:
    worst = (max if sign.above else min)(found.values())
    where = f"in {len(found)} of {phases} phases, last in phase {max(found)}"
    return f"{sign.what} {where}: {worst:.3g} at the worst ({sign.condition})."


def unfiltered(row: Mapping[str, float]) -> Mapping[str, float]:
    """A phase as it was before dynamic sampling left groups out."""
    return {**row, **{name: row[found] for name, found in UNFILTERED.items() if found in row}}


def latest(name: str) -> Measure:
    return lambda history, phase: history[phase - 1].get(name)


def per_token(name: str) -> Measure:
    """A mean over responses, divided by their mean length."""

    def measure(history: History, phase: int) -> float | None:
        value, length = (history[phase - 1].get(column) for column in (name, "response/length"))
        return value / length if value is not None and length else None

    return measure


def beside_the_first(name: str) -> Measure:
    """The value of a phase as a multiple of that of phase 1."""

    def measure(history: History, phase: int) -> float | None:
        first, last = history[0].get(name), history[phase - 1].get(name)
        return last / first if last is not None and first is not None and first > 0 else None

    return measure


def mean_of_last(name: str, count: int) -> Measure:
    def measure(history: History, phase: int) -> float | None:
        values = [row[name] for row in history[max(phase - count, 0) : phase] if name in row]
        return sum(values) / count if len(values) == count else None

    return measure


def gain(name: str, count: int) -> Measure:
    """How far the mean of the last `count` phases lies above that of the first ones, once these do not overlap."""
    mean = mean_of_last(name, count)

    def measure(history: History, phase: int) -> float | None:
        first, last = mean(history, count), mean(history, phase)
        return last - first if phase >= 2 * count and first is not None and last is not None else None

    return measure


SIGNS = (
    Sign("KL explodes", "objective/kl / response/length", per_token("objective/kl"), 0.5, above=True),
    Sign(
        "Reward stalls",
        "objective/scores, mean of the last 5 phases less that of the first 5",
        gain("objective/scores", 5),
        0,
        above=False,
    ),
    Sign("Length grows", "response/length / that of phase 1", beside_the_first("response/length"), 1.5, above=True),
    Sign(
        "Entropy collapses", "policy/entropy / that of phase 1", beside_the_first("policy/entropy"), 0.25, above=False
    ),
    Sign(
        "The critic explains nothing",
        "value/explained_variance, mean of the last 3 phases",
        mean_of_last("value/explained_variance", 3),
        0,
        above=False,
    ),
    Sign("Groups have no variance", "group/without_variance", latest("group/without_variance"), 0.5, above=True),
    Sign("Replies in a group repeat", "group/distinct", latest("group/distinct"), 0.5, above=False),
)
