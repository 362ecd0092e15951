"""The last line of a launch: of its processes, which all meet the same end, one says it."""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

SECONDS_OF_A_CLAIM = 3600.0  # after the first process of a launch has spoken for all, the others end within a minute


def speak_for_all(message: str) -> None:
    """Print a last line on stderr, once a launch, whichever of its processes comes first."""
    if _speaks_for_all_processes():
        print(message, file=sys.stderr, flush=True)


def _speaks_for_all_processes() -> bool:
    """True in one process a launch: all ranks meet the same mistake, the first to get here reports it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    parent = f"{os.getppid()}-{_start_time(os.getppid())}"  # process ids come again, in containers soon
    launch = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}-{os.environ.get('MASTER_PORT', '')}-{parent}"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    folder = Path(tempfile.gettempdir())
    claim = folder / f"stagewise-error-{launch}-{attempt}"
    _remove_old(folder.glob("stagewise-error-*"))
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _remove_old(claims: Iterable[Path]) -> None:
    """Remove the claims of launches that ended long ago; those of other users stay."""
    for claim in claims:
        with contextlib.suppress(OSError):
            if time.time() - claim.stat().st_mtime > SECONDS_OF_A_CLAIM:
                claim.unlink()


def _start_time(process_id: int) -> str:
    """When a process was started, in clock ticks since boot; empty where there is no /proc."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
