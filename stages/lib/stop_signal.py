"""SIGTERM and Ctrl-C while work is under way: noted, agreed on by all processes, obeyed within seconds.

Outside such work a signal ends a stage at once (see `stages.lib.errors.run`).
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, Self

from stages.lib.errors import STOP_SIGNALS
from stages.lib.processes import Processes

GRACE_SECONDS = 20.0  # launchers kill 30 seconds after they have asked


class StopSignal:
    """A flag that SIGTERM and SIGINT set. Inside `with`, and in the main thread, as Python has it.

    Work that does not come to look at the flag within GRACE_SECONDS is left as it stands: the process then ends without
    saving, since the launcher would kill it a little later.
    """

    def __init__(self, name: str, processes: Processes) -> None:
        self.name = name
        self.processes = processes
        self.number = 0
        self._saving = False

    def __enter__(self) -> Self:
        self._old_handlers = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        self._old_handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._give_up)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        if kind is None and self.number:
            signal.raise_signal(self.number)  # it came after the last look

    def _note(self, number: int, _frame: object) -> None:
        if not self.number and not self._saving:
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
        self.number = number

    def _give_up(self, _number: int, _frame: object) -> None:
        self._say(f"within {GRACE_SECONDS:.0f} s no place to save was reached; what was saved before stands")
        os._exit(128 + self.number)

    def agreed(self) -> bool:
        """True in all processes if one of them has got a signal. All processes call this together."""
        got = self.processes.sum([float(self.number == number) for number in STOP_SIGNALS])
        for number, count in zip(STOP_SIGNALS, got, strict=True):
            if count:
                self.number = number
                return True
        return False

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside, a signal is noted and no time limit runs: a kill in the middle of a save does no harm."""
        self._saving = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            yield
        finally:
            self._saving = False

    def leave(self, saved: str) -> NoReturn:
        """End with exit code 128 + the signal's number, and one line that says what is `saved`."""
        self._say(saved)
        sys.exit(128 + self.number)

    def _say(self, text: str) -> None:
        if self.processes.is_main:
            print(f"\n{self.name}: stopped by {signal.Signals(self.number).name}; {text}", flush=True)
