"""Which weights a training stage ends with: the last ones, or the best it evaluated."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch


class Kept(NamedTuple):
    """The weights to publish, the step (1-based) they are from, and what their evaluation found."""

    weights: dict[str, torch.Tensor]
    step: int
    results: dict[str, float]


class BestWeights:
    """Keeps a copy of the weights with the lowest evaluation loss, if `keep` is "best"; part of a checkpoint."""

    def __init__(self, keep: Literal["best", "last"]) -> None:
        self.keep = keep
        self.step = 0
        self.results: dict[str, float] = {}
        self.weights: dict[str, torch.Tensor] | None = None

    def offer(self, results: Mapping[str, float], step: int, weights: dict[str, torch.Tensor]) -> None:
        """Take note of an evaluation; with "best", copy `weights` if `results["loss"]` is below all earlier ones."""
        if self.keep == "last":
            self.step, self.results = step, dict(results)
        elif not self.results or results["loss"] < self.results["loss"]:
            self.step, self.results = step, dict(results)
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}

    def choose(self, last: dict[str, torch.Tensor]) -> Kept:
        """What to publish. `last` are the weights after the last step, which is always evaluated."""
        return Kept(last if self.weights is None else self.weights, self.step, self.results)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "results": self.results, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.results, self.weights = state["step"], state["results"], state["weights"]
