"""One stage in a forked child with limits on time and memory, its input closed and its output kept apart."""

import ctypes
import importlib
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

from tests.stages.tiny_pipeline import script

MEMORY_BYTES = 3 * 2**30  # beside what the parent has mapped
# Linux: what lets root pass over the permissions of files, and the calls that give it up.
PASSING_PERMISSIONS = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
CAPABILITY_VERSION_3 = 0x20080522
PR_CAPBSET_DROP = 24


class Ended(NamedTuple):
    """How a stage ended. `status` is None if it had to be killed at its limit, negative if a signal killed it."""

    stage: str
    status: int | None
    stdout: str
    stderr: str
    seconds: float


def run_stage(folder: Path, stage: str, options: list[str], seconds: float, *, unprivileged: bool) -> Ended:
    """Run a stage's real `main` through `stages.lib.command.run.run` in `folder`, for at most so many seconds."""
    captured = [folder.parent / f"{folder.name}.{name}" for name in ("stdout", "stderr")]
    descriptors = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666) for path in captured]
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_the_stage(folder, stage, options, descriptors, unprivileged)
    for descriptor in descriptors:
        os.close(descriptor)
    status = _waited(child, started + seconds)
    _kill_group(child)  # what it has started itself
    stdout, stderr = (path.read_text(encoding="utf-8", errors="backslashreplace") for path in captured)
    return Ended(stage, status, stdout, stderr, time.monotonic() - started)


def _waited(child: int, until: float) -> int | None:
    pause = 0.002
    while time.monotonic() < until:
        done, waited = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(waited)
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    _kill_group(child)
    os.waitpid(child, 0)
    return None


def _kill_group(child: int) -> None:
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        return


def _be_the_stage(folder: Path, stage: str, options: list[str], descriptors: list[int], unprivileged: bool) -> NoReturn:
    status = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for target, descriptor in enumerate(descriptors, start=1):
            os.dup2(descriptor, target)
        os.chdir(folder)
        os.environ |= {"STAGEWISE_SCRATCH": str(folder / ".scratch"), "HOME": str(folder / ".home")}
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, mapped + MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if unprivileged:
            obey_permissions()
        from stages.lib.command.run import run

        module = importlib.import_module(f"stages.{script(stage)}")
        sys.argv = [script(stage), *options]
        run(module.main)
        status = 0
    except SystemExit as ended:
        status = _exit_code(ended.code)
    except BaseException:  # as the interpreter would
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def obey_permissions() -> None:
    """Have this process, and those that it starts, held back by permissions even if it runs as root."""
    library = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):
        library.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, in two halves
    library.capget(header, sets)
    for number in range(3):
        sets[number] &= ~PASSING_PERMISSIONS
    if library.capset(header, sets):
        raise OSError(ctypes.get_errno(), "permissions cannot be made to count")


def _exit_code(code: object) -> int:
    if isinstance(code, int):
        return code
    if code is not None:
        print(code, file=sys.stderr)
    return 0 if code is None else 1
