"""Ends a process that was asked to stop and does not come to it, before its launcher kills it.

Python runs a signal's handler between two steps of the main thread, so one that waits in a collective for a process
that is gone never gets to it. A second thread learns of the signal at once (`signal.set_wakeup_fd`) and counts time.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE_SECONDS = 5.0  # to tidy up, where nothing is to be saved


class StopWatch:
    """What a process may take to end after SIGTERM or SIGINT: PATIENCE_SECONDS, unless `allow` says otherwise."""

    def __init__(self) -> None:
        self._allowed: float | None = PATIENCE_SECONDS
        self._since = 0.0

    def start(self, say: Callable[[str], None]) -> None:
        """Watch from now on; `say` gets the line that tells of an end by this watch. In the main thread."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reading, say), daemon=True).start()

    @contextmanager
    def allow(self, seconds: float | None) -> Iterator[None]:
        """Inside, it may take so long from the signal on, or (None) as it likes. Afterwards the clock starts anew."""
        before = self._allowed
        self._set(seconds)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, seconds: float | None) -> None:
        self._since, self._allowed = time.monotonic(), seconds

    def _watch(self, reading: int, say: Callable[[str], None]) -> None:
        number = 0
        while number not in STOP_SIGNALS:
            number = os.read(reading, 1)[0]
        asked = time.monotonic()
        while self._allowed is None or time.monotonic() - max(asked, self._since) < self._allowed:
            time.sleep(0.05)
        say(f"stopped by {signal.Signals(number).name}; no place to save was reached, what was saved before stands")
        os._exit(128 + number)


STOP_WATCH = StopWatch()
