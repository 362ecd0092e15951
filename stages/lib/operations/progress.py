"""The progress of a run on the console."""

import sys
import time
from collections.abc import Mapping


class Progress:
    """Where a run stands: refreshed in place on a terminal, a plain line every `log_seconds` in a log.

    Args:
        unit: what `done` counts beside steps, for instance "tokens".
    """

    def __init__(self, name: str, total: int, log_seconds: float, *, first: int = 0, unit: str = "tokens") -> None:
        self.name = name
        self.total = total
        self.log_seconds = log_seconds
        self.unit = unit
        self.first = first
        self.units = 0
        self.started = time.monotonic()
        self.last_line = self.started
        self.on_terminal = sys.stdout.isatty()

    def update(self, done: int, units: int, metrics: Mapping[str, float]) -> None:
        """Report that `done` of `total` steps are over; `units` were handled in the last one."""
        self.units += units
        now = time.monotonic()
        last = done >= self.total
        if not self.on_terminal and not last and done > self.first + 1 and now - self.last_line < self.log_seconds:
            return
        self.last_line = now
        elapsed = max(now - self.started, 1e-9)
        left = elapsed / max(done - self.first, 1) * (self.total - done)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        text = (
            f"{self.name}  {done}/{self.total}  {shown}  "
            f"{self.units / elapsed:,.0f} {self.unit}/s  {int(left // 60)}:{int(left % 60):02d} left"
        )
        if self.on_terminal:
            print(f"\r\033[K{text}", end="\n" if last else "", flush=True)
        else:
            print(text, flush=True)
