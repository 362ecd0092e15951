"""Which weights a training stage ends with, the last ones or the best it evaluated; and when it has seen enough."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch

from stages.lib.settings.epochs import BestBy, EarlyStopping


def cost_of(results: Mapping[str, float], best_by: BestBy) -> float:
    """What evaluations are compared by, the lower the better: the metric, or its negative if higher is better."""
    found = results[best_by.metric]
    return found if best_by.better == "lower" else -found


class Patience:
    """Whether training goes on; part of a checkpoint.

    It is over after `patience` evaluations in a row of which none was better than the best before them by more than
    `min_delta`. Small gains add up: what counts as the best moves only by gains that are large enough.
    """

    def __init__(self, settings: EarlyStopping | None) -> None:
        self.settings = settings
        self.lowest = math.inf
        self.misses = 0

    def offer(self, cost: float) -> None:
        """Take note of an evaluation."""
        if self.settings is None:
            return
        if cost < self.lowest - self.settings.min_delta:
            self.lowest, self.misses = cost, 0
        else:
            self.misses += 1

    @property
    def is_over(self) -> bool:
        return self.settings is not None and self.misses >= self.settings.patience

    def state_dict(self) -> dict[str, Any]:
        return {"lowest": self.lowest, "misses": self.misses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lowest, self.misses = state["lowest"], state["misses"]


class Kept(NamedTuple):
    """The weights to publish, the step (1-based) they are from, and what their evaluation found."""

    weights: dict[str, torch.Tensor]
    step: int
    results: dict[str, float]


class BestWeights:
    """Keeps a copy of the weights with the best evaluation, if `keep` is "best"; part of a checkpoint.

    The copy is in the main process alone, the rest in all of them.
    """

    def __init__(self, keep: Literal["best", "last"], best_by: BestBy, *, is_main: bool) -> None:
        self.keep = keep
        self.best_by = best_by
        self.is_main = is_main
        self.step = 0
        self.results: dict[str, float] = {}
        self.weights: dict[str, torch.Tensor] | None = None

    def offer(self, results: Mapping[str, float], step: int, weights: Callable[[], dict[str, torch.Tensor]]) -> None:
        """Take note of an evaluation; with "best", copy `weights()` if it is better than all earlier ones."""
        if self.keep == "last":
            self.step, self.results = step, dict(results)
        elif not self.results or cost_of(results, self.best_by) < cost_of(self.results, self.best_by):
            self.step, self.results = step, dict(results)
            found = weights()
            # Tied weights are one tensor under two names, and stay one.
            own = {tensor.data_ptr(): tensor.detach().cpu().clone() for tensor in found.values()}
            self.weights = {name: own[tensor.data_ptr()] for name, tensor in found.items()}

    def choose(self, last: Callable[[], dict[str, torch.Tensor]]) -> Kept:
        """What to publish. `last()` are the weights after the last step, which is always evaluated."""
        return Kept(last() if self.weights is None else self.weights, self.step, self.results)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "results": self.results, "names": self._tied_names()}

    def _tied_names(self) -> dict[str, str] | None:
        """Each name of a weight → the first name of the same tensor."""
        if self.weights is None:
            return None
        first: dict[int, str] = {}
        return {name: first.setdefault(id(tensor), name) for name, tensor in self.weights.items()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The copy, in the main process, which alone has one."""
        firsts = {*(self._tied_names() or {}).values()}
        yield from ((name, weight) for name, weight in (self.weights or {}).items() if name in firsts)

    def load_state_dict(self, state: dict[str, Any], read: Callable[[str], torch.Tensor]) -> None:
        self.step, self.results, names = state["step"], state["results"], state["names"]
        if names is None:
            self.weights = None
            return
        kept = {}
        for first in dict.fromkeys(names.values()):
            tensor = read(first)
            if self.is_main:
                kept[first] = tensor.clone()  # it may be a view of the checkpoint's file, which is removed in time
        self.weights = {name: kept[first] for name, first in names.items()} if self.is_main else {}
