"""A mean over all that an objective has seen, such as BCO's reward shift."""

from typing import Any

import torch


class RunningMean:
    """The mean of all that was added so far, in float64, 0 before; part of a checkpoint."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0

    def add(self, values: torch.Tensor) -> None:
        """Take in (n,) values, at least one."""
        self.count += len(values)
        self.mean += (float(values.double().mean()) - self.mean) * len(values) / self.count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean = state["count"], state["mean"]
