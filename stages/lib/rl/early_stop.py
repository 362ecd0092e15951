"""A training that ended before its last phase."""

from typing import Any


class EarlyStop:
    """After how many phases a policy was too far from its start, or had ceased to improve; part of a checkpoint."""

    def __init__(self) -> None:
        self.stopped_after = 0  # never

    def state_dict(self) -> dict[str, Any]:
        return {"stopped_after": self.stopped_after}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stopped_after = state["stopped_after"]
