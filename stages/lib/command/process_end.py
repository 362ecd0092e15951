"""How the process of a stage ends."""

import atexit
import os
import sys
from typing import NoReturn


def end_process(status: int | str | None = 0) -> NoReturn:
    """End this process as `sys.exit` does; one that a launcher started, without dismantling the interpreter.

    A thread of gloo lets go of a collective's tensors some time after the collective, and aborts the process
    (SIGABRT, "terminate called without an active exception") if it needs an interpreter that is being dismantled.
    """
    if "RANK" not in os.environ or isinstance(status, str):
        sys.exit(status)
    atexit._run_exitfuncs()
    end_now(status or 0)


def end_now(status: int) -> NoReturn:
    """End without what Python and the libraries do at their end, some of which waits for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
