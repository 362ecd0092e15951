"""A phase whose updates are made, and whose evaluation is still to come."""

from collections.abc import Mapping
from typing import Any


class TrainedPhase:
    """What was measured in it, until its row of the curve is written; part of a checkpoint.

    Where a reward fails in the evaluation, the checkpoint is of the middle of a phase, which goes on from there.
    """

    def __init__(self) -> None:
        self.row: dict[str, float] | None = None  # None: no phase waits for its evaluation
        self.tokens = 0  # of its responses

    def begin(self, row: Mapping[str, float], tokens: int) -> None:
        """Note a phase when its updates are over, and its responses are logged."""
        self.row, self.tokens = dict(row), tokens

    def end(self) -> None:
        """Forget it, now that its row is written."""
        self.row, self.tokens = None, 0

    def state_dict(self) -> dict[str, Any]:
        return {"row": self.row, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.row, self.tokens = state["row"], state["tokens"]
