"""What a tracker is, and what it is told of a step and of a run."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

SECONDS_TO_UPLOAD = 60.0  # that a run which ended well waits for its trackers


class TrackerSettings(Protocol):
    """What `runtime.yaml` says of trackers; the file explains each key."""

    trackers: tuple[str, ...]
    tracker_folder: str
    tracker_project: str
    tracker_run: str | None
    tracker_tags: tuple[str, ...]
    wandb_mode: str


@dataclass(frozen=True)
class Row:
    """What is tracked of one step (1-based); `time` in seconds since 1970."""

    step: int
    time: float
    values: dict[str, float]


class Tracker(Protocol):
    """One tracking backend. All but `give_up` are called in the tracker's own thread, and may raise anything."""

    def start(self, first_step: int, earlier: list[Row], /) -> None:
        """Open the run. `first_step` (1-based) comes next; `earlier` are the rows of the steps before it, in order.

        An earlier attempt has logged the earlier rows, or was killed before it could, and perhaps some of later steps.
        """

    def log(self, row: Row) -> None: ...

    def finish(self, results: Mapping[str, float], exit_code: int) -> None: ...

    def give_up(self) -> None:
        """Leave nothing behind for which the process would wait at its end. Called from any thread."""


def warn(text: str) -> None:
    print("warning:", *text.split(), file=sys.stderr, flush=True)
