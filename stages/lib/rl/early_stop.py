"""A training that ended before its last phase."""

from typing import Any


class EarlyStop:
    """After how many phases the policy had gone further from the SFT policy than allowed; part of a checkpoint."""

    def __init__(self) -> None:
        self.stopped_after = 0  # never

    def state_dict(self) -> dict[str, Any]:
        return {"stopped_after": self.stopped_after}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stopped_after = state["stopped_after"]
