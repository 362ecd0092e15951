"""What all trials of kills have in common: the signals that save first, and what must be said and how soon."""

import signal

STOPS = (signal.SIGTERM, signal.SIGINT)
SLOWEST_EXIT = 20.0  # seconds from a signal to the end of a tiny stage; launchers kill after 30
RESUMED = ("resuming", "already finished")


def wrong_words(output: str, seconds: float) -> list[str]:
    found = []
    if output.count("stopped by SIG") != 1 or "Traceback" in output:
        found.append(f"a stop is not told in one line: {output[-2000:]}")
    if seconds > SLOWEST_EXIT:
        found.append(f"took {seconds:.1f} s to end after a signal")
    return found
