"""A stage as a command: paths as options, and a user's mistake as one message with exit code 2 and no traceback."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from stages.lib.command.errors import StageError, StoppedError, one_line
from stages.lib.command.file_errors import file_message, no_space_explained
from stages.lib.command.kernels import choose_kernels
from stages.lib.command.out_of_memory import is_out_of_memory, out_of_memory_message
from stages.lib.command.process_end import end_now, end_process
from stages.lib.operations.code_closure import require_recorded_code
from stages.lib.operations.last_words import speak_for_all
from stages.lib.operations.lost_contact import end_after_lost_contact, is_lost_contact
from stages.lib.operations.stop_watch import STOP_SIGNALS, STOP_WATCH

USER_ERROR_EXIT_CODE = 2
PathOption = Annotated[Path, typer.Option()]  # a required --path option; DVC shows every input and output in a command


def _in_a_stage() -> bool:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec is not None and spec.name.startswith("stages.")


def _end_at_once(number: int, _frame: object) -> NoReturn:
    """End a stage that still loads libraries: no work is there to tidy up yet."""
    speak_for_all(f"stopped by {signal.Signals(number).name}")
    os._exit(128 + number)


# Not in `run`, which a script calls seconds later: a signal may come while it imports torch, and torch reads its
# environment as soon as it is imported.
if _in_a_stage():
    for _number in STOP_SIGNALS:
        signal.signal(_number, _end_at_once)
    choose_kernels()


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
        end_now(128 + stopped.number)
    except SystemExit as ended:
        if ended.code in [128 + number for number in STOP_SIGNALS]:
            end_now(ended.code)
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


def _raise_stopped(number: int, _frame: object) -> NoReturn:
    raise StoppedError(number)
