"""A stage as a command: paths as options, and a user's mistake as one message with exit code 2 and no traceback."""

import atexit
import contextlib
import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from stages.lib.command.errors import StageError, StoppedError, one_line
from stages.lib.command.out_of_memory import is_out_of_memory, out_of_memory_message
from stages.lib.operations.code_closure import require_recorded_code
from stages.lib.operations.last_words import speak_for_all
from stages.lib.operations.lost_contact import end_after_lost_contact, is_lost_contact
from stages.lib.operations.stop_watch import STOP_SIGNALS, STOP_WATCH

USER_ERROR_EXIT_CODE = 2
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PathOption = Annotated[Path, typer.Option()]  # a required --path option; DVC shows every input and output in a command


def asks_for_help() -> bool:
    """True if the command line asks for --help, which then need not wait for seconds until torch is loaded."""
    return "--help" in sys.argv[1:]


def run(main: Callable[..., None]) -> None:
    """Run a stage's `main` as a Typer command; a `StageError` becomes one message on stderr and exit code 2.

    So does a full disk, and a file or folder that cannot be read, written or replaced. SIGTERM and Ctrl-C end it at
    once, with one line and exit code 128 + their number, unless a stage handles them itself
    (`stages.lib.operations.stop_signal`).
    """
    STOP_WATCH.start(speak_for_all)
    old_handlers = {number: signal.signal(number, _raise_stopped) for number in STOP_SIGNALS}
    try:
        run_or_say_why_not(main)
    except StoppedError as stopped:  # also one that comes while a message is being written
        speak_for_all(f"stopped by {signal.Signals(stopped.number).name}")
        _end_now(128 + stopped.number)
    except SystemExit as ended:
        if ended.code in [128 + number for number in STOP_SIGNALS]:
            _end_now(ended.code)
        end_process(ended.code)
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


def run_or_say_why_not(main: Callable[..., None]) -> NoReturn:
    """As `run`, without a watch over signals."""
    try:
        require_recorded_code()
        with no_space_explained():
            as_command(main)
    except StageError as error:
        _say(str(error))
    except TyperException as error:
        _say(error.format_message())
    except OSError as error:
        if is_out_of_memory(error):
            _say(out_of_memory_message(error))
        if error.filename is None and not isinstance(error, shutil.Error):
            raise
        _say(file_message(error))
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            _say(out_of_memory_message(error))
        if not is_lost_contact(error):
            raise
        end_after_lost_contact(error)


def _say(message: str) -> NoReturn:
    """Say what the user's mistake is, and exit."""
    speak_for_all(f"error: {one_line(message)}")
    sys.exit(USER_ERROR_EXIT_CODE)


def as_command(main: Callable[..., None]) -> NoReturn:
    """Call `main` with what the command line says, and exit. Raises a TyperException where that is wrong."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(main)
    status = command(standalone_mode=False)
    sys.exit(status if isinstance(status, int) else 0)


def file_message(error: OSError) -> str:
    """What to say of a file or folder that the operating system does not let a stage read, write or replace."""
    if isinstance(error, shutil.Error) and error.args[0]:  # of a folder's copy: (from, to, reason) of each file
        _, path, reason = error.args[0][0]
        return f"{path}: {reason}"
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


def _is_a_stage(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec is not None and spec.name.startswith("stages.")


# A stage that is being started loads libraries for seconds before it comes to `run`: nothing is there to tidy up yet.
if _is_a_stage("__main__"):
    for _number in STOP_SIGNALS:
        signal.signal(_number, _end_at_once)
