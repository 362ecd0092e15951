"""Trackers: what goes to a run's curve also goes to TensorBoard and Weights & Biases, as `runtime.yaml` asks.

A tracker never touches a result, and the first error of one ends that tracker with a warning and nothing else. No state
is kept for them: what a run is gives it a name, and its curve has the rows that a resumed run sends again.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from stages.lib.command.errors import StoppedError
from stages.lib.operations.scratch_root import in_project
from stages.lib.operations.stop_watch import STOP_WATCH
from stages.lib.operations.tensorboard_tracker import TensorBoardTracker
from stages.lib.operations.tracker import SECONDS_TO_UPLOAD, ShownReply, TrackedRow, Tracker, TrackerSettings
from stages.lib.operations.wandb_tracker import WandbTracker, abandon_wandb

SECONDS_TO_START = 40.0  # more than wandb takes to find that its server is out of reach
SECONDS_TO_STOP = 8.0  # that a run waits which was stopped or failed: launchers kill what is still there after 30
LATE = "it was not done in time"


class Trackers:
    """The trackers of one run of a stage. Main process only.

    Args:
        settings: what the stage reads of `params.yaml`, by section; the trackers show it as the run's configuration.
        identity: of the run, the same for all attempts at it and no other: the end of its name.
    """

    def __init__(self, stage: str, settings: Mapping[str, Any], runtime: TrackerSettings, identity: str) -> None:
        self.config = {"stage": stage, **settings}
        self.name = "-".join(filter(None, (stage, runtime.tracker_run, identity)))
        self.runtime = runtime
        self.folder = in_project(Path(runtime.tracker_folder))
        self.results: dict[str, float] = {}
        self.open: dict[str, Tracker] = {}

    def start(self, first_step: int, earlier: Callable[[], Sequence[TrackedRow]]) -> None:
        """Open them. `first_step` (1-based) comes next; `earlier` reads the rows of the steps before."""
        for label in self.runtime.trackers:
            if label != "wandb" or self.runtime.wandb_mode != "disabled":
                with self._or_without(label):
                    self.open[label] = in_time(SECONDS_TO_START, partial(self._tracker, label, first_step, earlier))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Track the row of `step` (1-based)."""
        for label, tracker in list(self.open.items()):
            with self._or_without(label):
                tracker.log(step, values)

    def log_replies(self, step: int, replies: Sequence[ShownReply]) -> None:
        """Track what the model answers after `step` (1-based), whose row comes next."""
        for label, tracker in list(self.open.items()):
            with self._or_without(label):
                tracker.log_replies(step, replies)

    def add_results(self, results: Mapping[str, float]) -> None:
        """The final metrics of a run that has done all its steps, in this process or in an earlier one."""
        self.results = {f"final/{name}": value for name, value in results.items()}

    def close(self, exit_code: int) -> None:
        """End all trackers; takes long only if the run ended well and an upload is under way.

        SIGTERM or Ctrl-C cuts the waiting short and changes nothing else: the run has ended by now, well or not.
        """
        seconds = SECONDS_TO_STOP if exit_code else SECONDS_TO_UPLOAD
        with STOP_WATCH.allow(None):
            for label, tracker in list(self.open.items()):
                with self._or_without(label):
                    try:
                        in_time(seconds, partial(tracker.finish, self.results, exit_code))
                    except (KeyboardInterrupt, StoppedError):
                        raise TimeoutError(LATE) from None
        self.open = {}

    def _tracker(self, label: str, first_step: int, earlier: Callable[[], Sequence[TrackedRow]]) -> Tracker:
        if label == "tensorboard":
            return TensorBoardTracker(self.folder / "tensorboard" / self.name, self.config, first_step, earlier)
        return WandbTracker(self.name, self.config, self.runtime, self.folder, earlier)

    @contextlib.contextmanager
    def _or_without(self, label: str) -> Iterator[None]:
        """Whatever a tracker raises, the run goes on without it, and that is said once."""
        try:
            yield
        except Exception as error:
            reason = str(error) and f": {error}"
            text = f"tracking with {label} failed, the run goes on without it: {type(error).__name__}{reason}"
            print("warning:", *text.split(), file=sys.stderr, flush=True)
            self.open.pop(label, None)
            if label == "wandb":
                abandon_wandb()


def in_time(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises, in a thread of its own: a library may wait for longer than a run should.

    Raises:
        TimeoutError: it was not done in time.
    """
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(timeout=seconds)
    except TimeoutError:
        if future.done():
            raise
        raise TimeoutError(LATE) from None
