"""Processes in which a reward function runs, each response within a limit of time (see `function_worker.py`)."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stages.lib.command.errors import StageError, one_line
from stages.lib.command.quoted import nearest
from stages.lib.rl.rewards import function_worker
from stages.lib.rl.rewards.scoring import Failure, RewardScore

STARTING_SECONDS = 120.0  # to import the function and what it needs
AT_ONCE = 32  # requests that an async function has in hand
PROJECT = Path(__file__).resolve().parents[4]
Arguments = Mapping[str, Any]


class Request(NamedTuple):
    """One of the responses to score."""

    number: int
    arguments: Arguments


class Worker:
    """One process, and the requests that it has in hand."""

    def __init__(self, module: str, function: str) -> None:
        folders = dict.fromkeys([str(Path.cwd()), str(PROJECT)])
        self.process = subprocess.Popen(
            [sys.executable, "-P", function_worker.__file__, module, function, *folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the stage, which then closes the pipe
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.unread = b""
        self.hello: dict[str, Any] | None = None
        self.in_hand: dict[int, tuple[float, Request]] = {}  # by number, with the time by which it is late
        self.late_at = time.monotonic() + STARTING_SECONDS

    @property
    def at_once(self) -> int:
        """How many requests it takes; none before it is ready."""
        return 0 if self.hello is None else AT_ONCE if self.hello["is_async"] else 1

    @property
    def due(self) -> float:
        """When it is late with the first of them, or with starting."""
        if self.hello is None:
            return self.late_at
        return min((late_at for late_at, _ in self.in_hand.values()), default=float("inf"))

    def send(self, request: Request, seconds: float) -> None:
        assert self.hello is not None
        reads = self.hello["reads"]
        own = {name: value for name, value in request.arguments.items() if reads is None or name in reads}
        self.in_hand[request.number] = (time.monotonic() + seconds, request)
        line = json.dumps({"id": request.number, "arguments": own}).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # it has ended, which its stdout will say
            self.stdin.write(line)
            self.stdin.flush()

    def read(self) -> list[dict[str, Any]] | None:
        """The answers that have come; None if it has ended."""
        given = os.read(self.stdout.fileno(), 2**16)
        *lines, self.unread = (self.unread + given).split(b"\n")
        return [json.loads(line) for line in lines] if given else None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with what the function has started
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # of what it did not read
            self.stdin.close()
        self.stdout.close()


class WorkerPool:
    """Scores responses with a function, on several processes, which are started when they are first needed.

    Args:
        module: its module, dotted; found in the current folder, or in the project's.
        seconds: for one response, by the clock.
        most: processes.
        told: the function, for messages.
        stop: the first failure ends what is under way, since the run ends with it.
    """

    def __init__(self, module: str, function: str, seconds: float, most: int, told: str, *, stop: bool = False) -> None:
        self.module, self.function, self.seconds, self.most, self.told = module, function, seconds, most, told
        self.stop = stop
        self.workers: list[Worker] = []
        self.known: frozenset[str] = frozenset()  # the names of arguments that there are
        self.versions: dict[str, str] = {}  # of the packages that the function has imported

    def scores(self, arguments: Sequence[Arguments]) -> list[RewardScore]:
        """The score of each response, of which the function is given those arguments that it names.

        Where a failure ends what is under way, None for those that were not scored.

        Raises:
            StageError: the function cannot be loaded, or asks for an argument that there is not.
        """
        self.known = frozenset(arguments[0] if arguments else ())
        waiting = deque(Request(number, each) for number, each in enumerate(arguments))
        found: dict[int, RewardScore] = {}
        try:
            while len(found) < len(arguments) and not (self.stop and has_failed(found)):
                self._start(len(arguments) - len(found))
                self._hand_out(waiting)
                for worker in self._ready():
                    self._take(worker, found)
                for worker in [worker for worker in self.workers if worker.due <= time.monotonic()]:
                    self._end_late(worker, waiting, found)
        except BaseException:
            self.close()  # what is in hand would be answered to whoever asks next
            raise
        if len(found) < len(arguments):
            self.close()
        return [found.get(number) for number in range(len(arguments))]

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.kill()
        self.workers = []

    def _start(self, needed: int) -> None:
        self.workers += [Worker(self.module, self.function) for _ in range(len(self.workers), min(needed, self.most))]

    def _hand_out(self, waiting: deque[Request]) -> None:
        for worker in self.workers:
            while waiting and len(worker.in_hand) < worker.at_once:
                worker.send(waiting.popleft(), self.seconds)

    def _ready(self) -> Iterable[Worker]:
        """The processes that have written something, or ended, by the time that one is late."""
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
            due = min(worker.due for worker in self.workers)
            return [key.data for key, _ in selector.select(max(0.0, min(due - time.monotonic(), 60.0)))]

    def _take(self, worker: Worker, found: dict[int, RewardScore]) -> None:
        answers = worker.read()
        if answers is None:
            self._end(worker, f"its process ended with {told_status(worker.process.wait())}", found)
        for answer in answers or ():
            if worker.hello is None:
                self._greet(worker, answer)
                continue
            del worker.in_hand[answer["id"]]
            failed = "error" in answer
            found[answer["id"]] = Failure(answer["kind"], one_line(answer["error"])) if failed else answer["score"]

    def _greet(self, worker: Worker, hello: dict[str, Any]) -> None:
        if "error" in hello:
            raise StageError(f"{self.told} cannot be loaded: {one_line(hello['error'])}")
        unknown = [name for name in hello["needs"] if name not in self.known]
        if unknown:
            raise StageError(
                f"{self.told} asks for {unknown[0]}, which there is not{nearest(unknown[0], self.known)}; there is "
                f"{', '.join(sorted(self.known))}"
            )
        worker.hello = hello
        self.versions |= hello["versions"]

    def _end_late(self, worker: Worker, waiting: deque[Request], found: dict[int, RewardScore]) -> None:
        if worker.hello is None:
            raise StageError(f"{self.told} is not loaded after {STARTING_SECONDS:g} s")
        late = min(worker.in_hand, key=lambda number: worker.in_hand[number][0])
        del worker.in_hand[late]
        found[late] = Failure("timeout", f"it took more than {self.seconds:g} s")
        waiting.extendleft(request for _, request in worker.in_hand.values())
        self._drop(worker)

    def _end(self, worker: Worker, why: str, found: dict[int, RewardScore]) -> None:
        if worker.hello is None:
            raise StageError(f"{self.told} cannot be loaded: {why}")
        # Of several side by side nobody knows which of them ended it.
        found |= {number: Failure("error", why) for number in worker.in_hand}
        self._drop(worker)

    def _drop(self, worker: Worker) -> None:
        worker.kill()
        self.workers.remove(worker)


def has_failed(found: Mapping[int, RewardScore]) -> bool:
    return any(isinstance(score, Failure) for score in found.values())


def told_status(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit code {status}"
