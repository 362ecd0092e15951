"""What a tracker is, and what it is told of a run."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

SECONDS_TO_UPLOAD = 60.0  # that a run which ended well waits for its trackers
TrackerName = Literal["tensorboard", "wandb"]
TrackedRow = tuple[int, Mapping[str, float]]  # step (1-based), values


class ShownReply(NamedTuple):
    """The end of a prompt, and a reply to it, with special tokens."""

    prompt: str
    reply: str


class TrackerSettings(Protocol):
    """What `runtime.yaml` says of trackers; the file explains each key."""

    @property
    def trackers(self) -> tuple[TrackerName, ...]: ...
    @property
    def tracker_folder(self) -> str: ...
    @property
    def tracker_project(self) -> str: ...
    @property
    def tracker_run(self) -> str | None: ...
    @property
    def tracker_tags(self) -> tuple[str, ...]: ...
    @property
    def wandb_mode(self) -> Literal["offline", "online", "disabled"]: ...


class Tracker(Protocol):
    """One tracking backend, opened for a run when it is made. Its methods may raise anything."""

    def log(self, step: int, values: Mapping[str, float], /) -> None: ...

    def log_replies(self, step: int, replies: Sequence[ShownReply], /) -> None: ...

    def finish(self, results: Mapping[str, float], exit_code: int, /) -> None: ...
