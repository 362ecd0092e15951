"""Trackers: what goes to a run's curve also goes to TensorBoard and Weights & Biases, as `runtime.yaml` asks.

A tracker never touches a result. Each has a thread of its own, so that training waits for none, and the first error of
one ends that tracker with a warning and nothing else. What was tracked also stands in a journal in the scratch folder:
from it a resumed run takes the id it goes on under, and the rows that a tracker lost when the run was killed.
"""

import contextlib
import itertools
import json
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages.lib.command.errors import StoppedError
from stages.lib.operations.scratch_root import in_project
from stages.lib.operations.stop_watch import STOP_WATCH
from stages.lib.operations.tracker import SECONDS_TO_UPLOAD, Row, Tracker, TrackerSettings, warn

HEAD_NAME = re.compile(r"\w[\w .-]*")
SECONDS_TO_STOP = 8.0  # and one that was stopped or failed: launchers kill what is still there after 30


class Journal:
    """The file of what a run tracked: a line with its id and name, then one a step.

    A run that starts at its first step begins a new journal; one that is resumed goes on in the old one, from which the
    steps that it makes again are taken out.

    Args:
        path: in the run's scratch folder.
        label: what the name ends in, or None for the time.
        first_step: the step (1-based) that comes next.
        is_taken: whether a name is that of an earlier run; the new one then gets a number.
    """

    def __init__(
        self, path: Path, stage: str, label: str | None, first_step: int, is_taken: Callable[[str], bool]
    ) -> None:
        self.path = path
        now = time.strftime("%Y%m%d-%H%M%S")
        head = {"id": f"{path.parent.name}-{now}", "name": f"{stage}-{label or now}"}
        self.rows: list[Row] = []
        old_head, *records = _whole_lines(path) or [None]
        if not _is_head(old_head):
            if path.is_file() and path.stat().st_size:
                warn(f"{path} is damaged; what it held of earlier steps is not tracked again")
            old_head = None
        same_name = re.compile(rf"{re.escape(head['name'])}(-\d+)?")
        if old_head and (first_step > 1 or (label and same_name.fullmatch(old_head["name"]))):
            head["name"] = old_head["name"]
        elif label:
            names = itertools.chain([head["name"]], (f"{head['name']}-{number}" for number in itertools.count(2)))
            head["name"] = next(name for name in names if not is_taken(name))
        if old_head and first_step > 1:
            head["id"] = old_head["id"]
            self.rows = [Row(**record) for record in records if _is_row(record) and record["step"] < first_step]
        self.id, self.name = head["id"], head["name"]
        path.write_text("".join(f"{json.dumps(line)}\n" for line in (head, *map(asdict, self.rows))))

    def append(self, row: Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")


def _is_head(line: Any) -> bool:
    """Whether the first line of a journal gives an id and a name that are fit to name a folder."""
    return isinstance(line, dict) and all(
        isinstance(line.get(key), str) and HEAD_NAME.fullmatch(line[key]) for key in ("id", "name")
    )


def _is_row(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and line.keys() == {"step", "time", "values"}
        and type(line["step"]) is int
        and isinstance(line["time"], float)
        and isinstance(line["values"], dict)
        and all(isinstance(value, int | float) for value in line["values"].values())
    )


def _whole_lines(path: Path) -> list[Any]:
    """The values of the lines of a JSONL file up to the first line that a kill has cut short."""
    records = []
    with contextlib.suppress(OSError, ValueError, RecursionError):
        for line in path.read_text().splitlines():
            records.append(json.loads(line))
    return records


class TrackerThread(threading.Thread):
    """Runs one tracker. After its first error it says so on stderr, once, and ignores what comes."""

    def __init__(self, label: str, tracker: Tracker) -> None:
        super().__init__(name=f"tracker-{label}", daemon=True)
        self.label = label
        self.tracker = tracker
        self.warned = threading.Lock()
        self.done = threading.Event()  # a signal in join() has Python 3.11 take the thread for dead
        self.orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def run(self) -> None:
        try:
            while order := self.orders.get():
                order()
        except Exception as error:  # whatever a tracker raises, training goes on
            self._warn(f"{type(error).__name__}: {error}")
            with contextlib.suppress(Exception):
                self.tracker.finish({}, 1)
            with contextlib.suppress(Exception):
                self.tracker.give_up()
        self.done.set()

    def order(self, call: Callable[..., None], *arguments: Any) -> None:
        """Have the tracker do something after all that was ordered before."""
        if not self.warned.locked():
            self.orders.put(lambda: call(*arguments))

    def leave(self) -> None:
        """Give the tracker up unless it has done all that was ordered."""
        if not self.done.is_set():
            self._warn("it was not done in time")
            with contextlib.suppress(Exception):
                self.tracker.give_up()

    def _warn(self, reason: str) -> None:
        if self.warned.acquire(blocking=False):
            warn(f"tracking with {self.label} failed, the run goes on without it: {reason}")


class Trackers:
    """The trackers of one run of a stage, opened with the first row. Main process only.

    Args:
        settings: what the stage reads of `params.yaml`, by section; the trackers show it as the run's configuration.
        journal: path of the journal, in the run's scratch folder.
    """

    def __init__(self, stage: str, settings: Mapping[str, Any], runtime: TrackerSettings, journal: Path) -> None:
        self.stage = stage
        self.settings = settings
        self.runtime = runtime
        self.folder = in_project(Path(runtime.tracker_folder))
        self.journal_path = journal
        self.journal: Journal | None = None
        self.results: dict[str, float] = {}
        self.threads: list[TrackerThread] = []
        disabled = {"wandb"} if runtime.wandb_mode == "disabled" else set()
        self.names = [name for name in runtime.trackers if name not in disabled]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Track the row of `step` (1-based)."""
        if not self._open(step):
            return
        row = Row(step, time.time(), dict(values))
        with self._journal_or_warning():
            self.journal.append(row)
        for thread in self.threads:
            thread.order(thread.tracker.log, row)

    def add_results(self, steps: int, results: Mapping[str, float]) -> None:
        """Track the final metrics of a run that has done all its `steps`, in this process or in an earlier one."""
        self._open(steps + 1)
        self.results = {f"final/{name}": value for name, value in results.items()}

    def close(self, exit_code: int) -> None:
        """End all trackers; takes long only if the run ended well and an upload is under way.

        SIGTERM or Ctrl-C cuts the waiting short and changes nothing else: the run has ended by now, well or not.
        """
        for thread in self.threads:
            thread.order(thread.tracker.finish, self.results, exit_code)
            thread.orders.put(None)
        deadline = time.monotonic() + (SECONDS_TO_STOP if exit_code else SECONDS_TO_UPLOAD)
        with STOP_WATCH.allow(None):
            with contextlib.suppress(KeyboardInterrupt, StoppedError):
                for thread in self.threads:
                    thread.done.wait(max(deadline - time.monotonic(), 0.1))
            for thread in self.threads:
                thread.leave()
        self.threads = []

    def _open(self, first_step: int) -> bool:
        """Open the trackers unless they are; False if there are none."""
        if self.names and not self.threads:
            with self._journal_or_warning():
                self.journal = Journal(
                    self.journal_path,
                    self.stage,
                    self.runtime.tracker_run,
                    first_step,
                    lambda name: (self.folder / "tensorboard" / name).exists(),
                )
                for name in self.names:
                    thread = TrackerThread(name, self._tracker(name, self.journal))
                    thread.order(thread.tracker.start, first_step, self.journal.rows)
                    thread.start()
                    self.threads.append(thread)
        return bool(self.threads)

    def _tracker(self, name: str, journal: Journal) -> Tracker:
        if name == "tensorboard":
            from stages.lib.operations.tensorboard_tracker import TensorBoardTracker

            return TensorBoardTracker(self.folder / "tensorboard" / journal.name, self.stage, self.settings)
        from stages.lib.operations.wandb_tracker import WandbTracker

        return WandbTracker(self.stage, self.settings, self.runtime, self.folder, journal.id, journal.name)

    @contextlib.contextmanager
    def _journal_or_warning(self) -> Iterator[None]:
        """Go on without trackers if the journal cannot be read or written."""
        try:
            yield
        except Exception as error:  # a journal that cannot be kept ends no training either
            reason = f"{self.journal_path}: {type(error).__name__}: {error}"
            warn(f"tracking failed, the run goes on without it: {reason}")
            self.names = []
