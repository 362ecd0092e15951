"""A stage's script in a forked child that a signal hits just before its n-th file operation.

The parent has loaded all libraries and computed nothing, so a start takes a second instead of eight. File operations
are seen by an audit hook of Python (opening for writing, renaming, removing, making folders, cutting short) and by
counting `os.fsync`; the stages need no hook of their own.
"""

import importlib
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tests.stages.tiny_pipeline import script, stage_options

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR


class Ended(NamedTuple):
    """How a forked stage ended."""

    status: int  # negative: the signal that killed it
    output: str
    operations: list[str]  # file operations in order, as "os.rename checkpoint-#.partial"
    seconds: float
    seconds_after_signal: float


class FileOperations:
    """Counts the file operations below a folder, and calls `act` before one of them.

    Args:
        at: which: its number (1-based), or its name, digits as "#", and how often that was met.
    """

    def __init__(self, folder: Path, log: Path, at: int | tuple[str, int] | None, act: Callable[[], None]) -> None:
        self.folder = f"{folder}/"
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.at = at
        self.act = act
        self.count = 0
        self.met: Counter[str] = Counter()
        sys.addaudithook(self._heard)
        sync = os.fsync
        os.fsync = lambda descriptor: (self._next("os.fsync", ""), sync(descriptor))[1]

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | os.PathLike) and flags & WRITING and self._is_ours(os.fspath(path)):
                self._next("open", os.fspath(path))
        elif event in CHANGES:
            path = arguments[0]
            below_open_folder = event in ("os.remove", "os.rmdir") and arguments[1] != -1
            if isinstance(path, str | os.PathLike) and (below_open_folder or self._is_ours(os.fspath(path))):
                self._next(event, os.fspath(path))

    def _is_ours(self, path: str) -> bool:
        return os.path.abspath(path).startswith(self.folder)  # noqa: PTH100 pathlib would call the hook again

    def _next(self, event: str, path: str) -> None:
        name = f"{event} {path.rsplit('/', 1)[-1]}"
        os.write(self.log, f"{name}\t{time.monotonic()}\n".encode())
        self.count += 1
        name = re.sub(r"\d+", "#", name)
        self.met[name] += 1
        if self.at in (self.count, (name, self.met[name])):
            self.act()


def load_libraries(stages: list[str]) -> None:
    """Import all that the stages import, so that children need not."""
    for stage in stages:
        importlib.import_module(f"stages.{script(stage)}")
    # What they import only once they need it; DeepSpeed is imported by transformers when it saves a model.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    later = (
        "stages.tools.prune_scratch",
        "ruamel.yaml",
        "datasets",
        "deepspeed",
        "pydantic",
        "transformers.modeling_utils",
    )
    for name in (
        *later,
        "transformers.models.llama.modeling_llama",
        "transformers.convert_slow_tokenizer",
        "torch.profiler._cupti_monitor",
    ):
        importlib.import_module(name)


def run_forked(folder: Path, stage: str, at: int | None = None, number: int = 9) -> Ended:
    """Run a stage in a child, hit by signal `number` before its file operation `at` (1-based)."""
    from stages.lib.command.run import run

    def main() -> None:
        module = importlib.import_module(f"stages.{script(stage)}")
        sys.argv = [script(stage), *stage_options(stage)]
        run(module.main)

    return in_child(folder, main, at, number)


def prune_forked(folder: Path) -> Ended:
    from stages.lib.command.run import run
    from stages.tools.prune_scratch import main

    def prune() -> None:
        sys.argv = ["prune_scratch"]
        run(main)

    return in_child(folder, prune)


def in_child(folder: Path, main: Callable[[], None], at: int | None = None, number: int = 9) -> Ended:
    output, log = folder.parent / f"{folder.name}.output", folder.parent / f"{folder.name}.operations"
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_the_child(folder, output, log, main, at, number)
    _, waited = os.waitpid(child, 0)
    ended = time.monotonic()
    lines = [line.split("\t") for line in log.read_text().splitlines()]
    operations = [re.sub(r"\d+", "#", name) for name, _ in lines]
    hit = float(lines[at - 1][1]) if at is not None and at <= len(lines) else ended
    return Ended(os.waitstatus_to_exitcode(waited), output.read_text(), operations, ended - started, ended - hit)


def _be_the_child(
    folder: Path, output: Path, log: Path, main: Callable[[], None], at: int | None, number: int
) -> NoReturn:
    status = 1
    try:
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.chdir(folder)
        os.environ["STAGEWISE_SCRATCH"] = str(folder / ".scratch")
        FileOperations(folder, log, at, lambda: os.kill(os.getpid(), number))
        main()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def kill_points(operations: list[str]) -> list[int]:
    """The operations (1-based) worth a kill: the first three of each name, and all of the end.

    A run repeats itself: its seventh checkpoint is written like its third.
    """
    seen: Counter[str] = Counter()
    chosen = []
    last = max((place for place, name in enumerate(operations) if "checkpoint" in name), default=len(operations))
    for place, name in enumerate(operations):
        seen[name] += 1
        if seen[name] <= 3 or place > last:
            chosen.append(place + 1)
    return chosen
