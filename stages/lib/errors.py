"""A stage as a command: paths as options, and a user's mistake as one message with exit code 2 and no traceback."""

import atexit
import contextlib
import errno
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from stages.lib.lost_contact import end_after_lost_contact, is_lost_contact
from stages.lib.stop_watch import STOP_SIGNALS, STOP_WATCH

USER_ERROR_EXIT_CODE = 2
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SECONDS_OF_A_CLAIM = 3600.0  # after the first process of a launch has spoken for all, the others end within a minute
LONGEST_MESSAGE = 1000  # characters; what a message quotes (a path, a value, a library's words) may be of any length
PathOption = Annotated[Path, typer.Option()]  # a required --path option; DVC shows every input and output in a command


class StageError(Exception):
    """A mistake in a setting, a row or a file. The message says what, where, what was expected and what to do."""


class StoppedError(BaseException):
    """SIGTERM or Ctrl-C, raised where it arrived so that half-written outs are removed on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def asks_for_help() -> bool:
    """True if the command line asks for --help, which then need not wait for seconds until torch is loaded."""
    return "--help" in sys.argv[1:]


def run(main: Callable[..., None]) -> None:
    """Run a stage's `main` as a Typer command; a `StageError` becomes one message on stderr and exit code 2.

    So does a full disk, and a file or folder that cannot be read, written or replaced. SIGTERM and Ctrl-C end it at
    once, with one line and exit code 128 + their number, unless a stage handles them itself
    (`stages.lib.stop_signal`).
    """
    STOP_WATCH.start(speak_for_all)
    old_handlers = {number: signal.signal(number, _raise_stopped) for number in STOP_SIGNALS}
    try:
        with no_space_explained():
            typer.run(main)
    except StageError as error:
        _end(f"error: {one_line(str(error))}", USER_ERROR_EXIT_CODE)
    except OSError as error:
        if error.filename is None:
            raise
        _end(f"error: {one_line(_file_message(error))}", USER_ERROR_EXIT_CODE)
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        end_after_lost_contact(error)
    except StoppedError as stopped:
        speak_for_all(f"stopped by {signal.Signals(stopped.number).name}")
        _end_now(128 + stopped.number)
    except SystemExit as ended:
        if ended.code in [128 + number for number in STOP_SIGNALS]:
            _end_now(ended.code)
        end_process(ended.code)
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


def one_line(text: str) -> str:
    """`text` as one line of printable characters: a message may quote what a stranger's file holds.

    Line breaks, control characters and half surrogate pairs are escaped as in a Python string; a text longer than
    LONGEST_MESSAGE loses its middle.
    """
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
    if len(line) <= LONGEST_MESSAGE:
        return line
    half = LONGEST_MESSAGE // 2
    return f"{line[:half]} … {line[-half:]}"


def _file_message(error: OSError) -> str:
    """What to say of a file or folder that the operating system does not let a stage read, write or replace."""
    names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{names}: {error.strerror}; check that it exists, what it is (a file, a folder, a link) and its permissions"


def _no_space_message(error: Exception) -> str | None:
    """What to say of a write that did not fit; None if `error` means something else."""
    path, reason = "", str(error)
    if isinstance(error, shutil.Error) and error.args[0]:  # of a folder's copy: (from, to, reason) of each file
        _, path, reason = error.args[0][0]
    elif isinstance(error, OSError):
        path, reason = error.filename, error.strerror or str(error)
    # Copies and the library of safetensors say it in words only.
    if getattr(error, "errno", None) not in NO_SPACE and not any(os.strerror(number) in reason for number in NO_SPACE):
        return None
    where = f" at {path}" if path else f" in {Path.cwd()} or in the folder of training state"
    return f"no space left{where} ({reason}); free some and start again: what was saved before stands"


@contextlib.contextmanager
def no_space_explained() -> Iterator[None]:
    """Raise a StageError instead of whatever says that a disk is full."""
    try:
        yield
    except StageError:
        raise
    except Exception as error:  # libraries have types of their own for it; what means anything else goes on as it is
        message = _no_space_message(error)
        if message is None:
            raise
        raise StageError(message) from None


def _raise_stopped(number: int, _frame: object) -> NoReturn:
    raise StoppedError(number)


def _end(message: str, status: int) -> NoReturn:
    speak_for_all(message)
    end_process(status)


def end_process(status: int | str | None = 0) -> NoReturn:
    """End this process as `sys.exit` does; one that a launcher started, without dismantling the interpreter.

    A thread of gloo lets go of a collective's tensors some time after the collective, and aborts the process
    (SIGABRT, "terminate called without an active exception") if it needs an interpreter that is being dismantled.
    """
    if "RANK" not in os.environ or isinstance(status, str):
        sys.exit(status)
    atexit._run_exitfuncs()
    _end_now(status or 0)


def _end_now(status: int) -> NoReturn:
    """End without what Python and the libraries do at their end, some of which waits for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end_at_once(number: int, _frame: object) -> NoReturn:
    speak_for_all(f"stopped by {signal.Signals(number).name}")
    os._exit(128 + number)


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


def _is_a_stage(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec is not None and spec.name.startswith("stages.")


# A stage that is being started loads libraries for seconds before it comes to `run`: nothing is there to tidy up yet.
if _is_a_stage("__main__"):
    for _number in STOP_SIGNALS:
        signal.signal(_number, _end_at_once)
