"""SIGTERM and Ctrl-C while work is under way: noted, agreed on by all processes, obeyed within seconds.

Outside such work a signal ends a stage at once (see `stages.lib.command.errors.run`).
"""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NoReturn, Protocol, Self

from stages.lib.operations.last_words import speak_for_all
from stages.lib.operations.stop_watch import STOP_SIGNALS, STOP_WATCH


class Sums(Protocol):
    """The processes of a launch, as far as they agree on a signal."""

    def sum(self, values: Sequence[float]) -> list[float]: ...


class StopSignal:
    """A flag that SIGTERM and SIGINT set. Inside `with`, and in the main thread, as Python has it.

    Work that does not come to look at the flag within `seconds` is left as it stands: the process then ends without
    saving, since the launcher would kill it a little later.
    """

    def __init__(self, name: str, processes: Sums, seconds: float) -> None:
        self.name = name
        self.seconds = seconds
        self.processes = processes
        self.number = 0

    def __enter__(self) -> Self:
        self._old_handlers = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        self._stack = ExitStack()
        self._stack.enter_context(STOP_WATCH.allow(self.seconds))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        if kind is None and self.number:
            signal.raise_signal(self.number)  # it came after the last look

    def _note(self, number: int, _frame: object) -> None:
        self.number = number

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
        """Inside, no time limit runs: a kill in the middle of a save does no harm."""
        with STOP_WATCH.allow(None):
            yield

    def leave(self, saved: str) -> NoReturn:
        """End with exit code 128 + the signal's number, and one line that says what is `saved`."""
        speak_for_all(f"{self.name}: stopped by {signal.Signals(self.number).name}; {saved}")
        sys.exit(128 + self.number)
