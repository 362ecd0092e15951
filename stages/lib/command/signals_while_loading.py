"""SIGTERM and Ctrl-C end a stage that still loads libraries with one line: no work is there to tidy up yet.

That takes seconds, before a script comes to `run`; so it is settled when this is imported, in the process of a stage.
"""

import os
import signal
import sys
from typing import NoReturn

from stages.lib.operations.last_words import speak_for_all
from stages.lib.operations.stop_watch import STOP_SIGNALS


def _end_at_once(number: int, _frame: object) -> NoReturn:
    speak_for_all(f"stopped by {signal.Signals(number).name}")
    os._exit(128 + number)


def is_a_stage(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec is not None and spec.name.startswith("stages.")


if is_a_stage("__main__"):
    for _number in STOP_SIGNALS:
        signal.signal(_number, _end_at_once)
