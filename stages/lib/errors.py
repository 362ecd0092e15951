"""A stage as a command: paths as options, and a user's mistake as one message with exit code 2 and no traceback."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from stages.lib.lost_contact import end_after_lost_contact, is_lost_contact

USER_ERROR_EXIT_CODE = 2
PathOption = Annotated[Path, typer.Option()]  # a required --path option; DVC shows every input and output in a command


class StageError(Exception):
    """A mistake in a setting, a row or a file. The message says what, where, what was expected and what to do."""


def asks_for_help() -> bool:
    """True if the command line asks for --help, which then need not wait for seconds until torch is loaded."""
    return "--help" in sys.argv[1:]


def run(main: Callable[..., None]) -> None:
    """Run a stage's `main` as a Typer command; a `StageError` becomes one message on stderr and exit code 2."""
    try:
        typer.run(main)
    except StageError as error:
        if _speaks_for_all_processes():
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR_EXIT_CODE)
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        end_after_lost_contact(error)


def _speaks_for_all_processes() -> bool:
    """True in one process a launch: all ranks meet the same mistake, the first to get here reports it."""
    if "RANK" not in os.environ:
        return True
    parent = f"{os.getppid()}-{_start_time(os.getppid())}"  # process ids come again, in containers soon
    launch = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}-{os.environ.get('MASTER_PORT', '')}-{parent}"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    claim = Path(tempfile.gettempdir()) / f"stagewise-error-{launch}-{attempt}"
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _start_time(process_id: int) -> str:
    """When a process was started, in clock ticks since boot; empty where there is no /proc."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
