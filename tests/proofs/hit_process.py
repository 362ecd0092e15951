"""A stage's script as a launcher starts it, whose first process takes the whole launch down before a file operation.

    torchrun --nproc_per_node=2 -m tests.proofs.hit_process LOG PLACE stages.train_rm --tokens ...

PLACE is "<n> <operation>" for the n-th operation of that name (as `tests/proofs/forked_stage.py` names them), "end" for
the moment after the script's last line, or "never". LOG gets the operations of the first process.
"""

import atexit
import os
import re
import runpy
import signal
import sys
from pathlib import Path

from tests.proofs.dvc_projects import kill_below
from tests.proofs.forked_stage import FileOperations


def take_down() -> None:
    """As a machine that goes down: the launcher, the other processes, this one."""
    kill_below(Path.cwd())
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    log, place, module, *sys.argv[1:] = sys.argv[1:]
    if os.environ.get("RANK", "0") == "0":
        count, _, name = place.partition(" ")
        FileOperations(Path.cwd(), Path(log), (name, int(count)) if name else None, take_down)
        if place == "end":
            atexit.register(take_down)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def operations(log: Path) -> list[str]:
    """The names of the operations that a log holds, in order."""
    return [re.sub(r"\d+", "#", line.split("\t")[0]) for line in log.read_text().splitlines()]


def place_of(names: list[str], index: int) -> str:
    """PLACE of the operation at `index` (0-based)."""
    return f"{names[: index + 1].count(names[index])} {names[index]}"


if __name__ == "__main__":
    main()
