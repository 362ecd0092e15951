"""Another process has died: what the ones that are left see of it, and how they end.

Their collective breaks off with an error that says nothing of the cause. One line is enough: the traceback of each of
them would bury the message of the process that died.
"""

import os
import re
import signal
import sys
import time
from typing import NoReturn

EXIT_CODE = 3
# Launchers look at their processes every second at most and blame the one that ended first.
SECONDS_FOR_THE_LAUNCHER = 3.0
SIGNS = (
    "connection closed by peer",  # gloo
    "connection reset by peer",
    "broken pipe",
    "failed to recv, got 0 bytes",  # the store
    "remote process exited or there was a network error",  # NCCL
    "closed by remote peer",
)


def is_lost_contact(error: BaseException) -> bool:
    """True if torch reports that the connection to another process broke, and no fault of this one."""
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def end_after_lost_contact(error: BaseException) -> NoReturn:
    """One line on stderr and exit code 3, once the launcher has had time to see the death that came first."""
    rank = os.environ.get("RANK", "0")
    first_line = str(error).splitlines()[0]
    reason = re.sub(r"^\[[^]]*\] ", "", first_line).split(". ")[0]  # without torch's file name, and its advice
    print(
        f"error: process {rank} lost contact with another one; its message, or the launcher's, says why ({reason})",
        file=sys.stderr,
        flush=True,
    )
    # The launcher that has seen it ends the others by a signal, of which there is nothing to be told.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_CODE))
    time.sleep(SECONDS_FOR_THE_LAUNCHER)
    sys.exit(EXIT_CODE)
