"""The tiny pipeline as a Git and DVC project in which every stage is up to date, for kills through DVC."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.stages.tiny_pipeline import PROJECT, change

IDENTITY = ["-c", "user.name=proof", "-c", "user.email=proof@localhost"]


def dvc_project(tiny: Path, folder: Path) -> Path:
    """A copy of `tiny` under Git and DVC, with the stages' code, all outs committed to its cache."""
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns(".scratch", "stages", "rewards"))
    for code in ("stages", "rewards"):
        shutil.copytree(PROJECT / code, folder / code, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".dvcignore"):
        shutil.copy(PROJECT / name, folder / name)
    (folder / ".dvc").mkdir()
    shutil.copy(PROJECT / ".dvc/config", folder / ".dvc/config")
    (folder / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
    change(folder / "runtime.yaml", {"default": {"checkpoint_seconds": 0.0}})
    git(folder, "init", "-q")
    done = start_dvc(folder, "commit", "--force", output=folder.parent / "commit.output").wait()
    assert done == 0, (folder.parent / "commit.output").read_text()
    git(folder, "add", "--all")
    git(folder, "commit", "-q", "-m", "tiny")
    return folder


def copy_of_project(folder: Path) -> Path:
    """A clone of the committed project, with the environment of this one."""
    subprocess.run(["git", "clone", "-q", str(PROJECT), str(folder)], check=True)
    (folder / ".venv").symlink_to(PROJECT / ".venv")
    return folder


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *IDENTITY, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start_dvc(folder: Path, *words: str, output: Path, **environment: str) -> subprocess.Popen:
    """Start DVC as in an activated environment, in a process group of its own; what it prints goes to `output`."""
    dropped = ("STAGEWISE_SCRATCH", "LAUNCH", "DVC_ROOT")
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    names = {f"GIT_{who}_{what}": "proof" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    with output.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "dvc", *words],
            cwd=folder,
            env={**inherited, **names, "PATH": path, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.005)


def processes_below(folder: Path) -> list[int]:
    """Ids of the processes that run in `folder` or below it."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            where = link.readlink()
        except OSError:
            continue
        if where.is_relative_to(folder):
            found.append(int(link.parent.name))
    return found


def kill_below(folder: Path) -> None:
    """SIGKILL to all that runs in `folder` or below it, as a machine that goes down does."""
    while alive := [number for number in processes_below(folder) if number != os.getpid()]:
        for number in alive:
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
