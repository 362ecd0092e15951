"""Which weights a training stage ends with: the last ones, or the best it evaluated."""

from typing import Any, Literal

import torch


class BestWeights:
    """Keeps a copy of the weights with the lowest evaluation loss, if `keep` is "best"; part of a checkpoint."""

    def __init__(self, keep: Literal["best", "last"]) -> None:
        self.keep = keep
        self.loss = float("inf")
        self.step = 0
        self.weights: dict[str, torch.Tensor] | None = None

    def offer(self, loss: float, step: int, weights: dict[str, torch.Tensor]) -> None:
        """Keep a copy of `weights` if `loss` is below all earlier ones. `step` is 1-based."""
        if self.keep == "best" and loss < self.loss:
            self.loss, self.step = loss, step
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}

    def choose(self, last: dict[str, torch.Tensor], last_step: int) -> tuple[dict[str, torch.Tensor], int]:
        """The weights to publish and the step (1-based) they are from."""
        return (self.weights, self.step) if self.weights is not None else (last, last_step)

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "step": self.step, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss, self.step, self.weights = state["loss"], state["step"], state["weights"]
