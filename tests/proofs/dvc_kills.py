"""Stages killed as DVC runs them: while it commits a result, in `dvc exp run --temp`, in a queue's worker.

Each function starts a stage of a project from `tests/proofs/dvc_projects.py`, kills it, starts it again, and returns
what is wrong with the end, in words.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.lib.command.hashing import dvc_hash
from stages.tools.dvc_lock import is_cut_off
from tests.proofs.dvc_projects import git, kill_below, start_dvc, wait_for
from tests.proofs.tiny_projects import differences, found_below, listing, outs_of
from tests.stages.tiny_pipeline import change, read_yaml, start, write_yaml

OTHER_RATE = "train_sft.sft.optimizer.learning_rate=0.0021"
ANOTHER_RATE = "train_sft.sft.optimizer.learning_rate=0.0022"  # or DVC would have the result in its run cache
SFT = "train_sft@sft"
TRIES = 8  # starts for each kill, at most
PATIENCE = 300.0  # seconds that a start may take on a busy machine


def killed_in_commit(project: Path, stage: str, draw: random.Random, kills: int, **environment: str) -> list[str]:
    """SIGKILL to DVC and all below it while it puts a result into its cache, before it writes dvc.lock.

    The time between the two, measured once, has `kills` parts, and a kill comes at a random moment of each. The next
    `dvc repro` must not compute again, and must end with the same dvc.lock and the same files.
    """
    commits = Commits(project, stage, environment)
    with cache_set_aside(project):
        seconds = commits.undisturbed()
        found: list[str] = []
        for part in range(kills):
            found += commits.killed(lambda part=part: seconds * (part + draw.random()) / kills)
        return found


class Commits:
    """DVC's commits of one stage's result, as a new one: not in its cache, not in dvc.lock."""

    def __init__(self, project: Path, stage: str, environment: dict[str, str]) -> None:
        self.project, self.stage, self.environment = project, stage, environment
        self.output = project.parent / "repro.output"
        self.lock_file = project / "dvc.lock"
        self.lock = self.lock_file.read_bytes()

    def start(self) -> subprocess.Popen:
        self.output.unlink(missing_ok=True)
        words = ("repro", "--single-item", "--force", self.stage)
        return start_dvc(self.project, *words, output=self.output, **self.environment)

    def start_anew(self) -> subprocess.Popen:
        """As if the stage had never run, and wait until the cache has its first file of the result."""
        self.before = without_record(self.lock_file, self.lock, self.stage)
        for name in (".scratch", ".dvc/cache"):
            shutil.rmtree(self.project / name, ignore_errors=True)
        process = self.start()
        wait_for(lambda: process.poll() is not None or self.in_cache(), PATIENCE, "a file in DVC's cache")
        return process

    def in_cache(self) -> bool:
        return bool(found_below(self.project, ".dvc/cache/files/md5/*/*"))

    def in_lock(self) -> bool:
        """Whether DVC has begun to write it."""
        return self.lock_file.read_bytes() != self.before

    def undisturbed(self) -> float:
        """Note what the result is. Returns the seconds from the first file in the cache to the first in dvc.lock."""
        process = self.start_anew()
        started = time.monotonic()
        wait_for(lambda: process.poll() is not None or self.in_lock(), PATIENCE, "the result in dvc.lock")
        seconds = time.monotonic() - started
        status = process.wait()
        assert status == 0, self.output.read_text()
        # On several processes sums are rounded otherwise, and the lock of before is of one.
        self.lock = self.lock_file.read_bytes()
        self.truth = listing_of(self.project)
        return seconds

    def killed(self, wait: Callable[[], float]) -> list[str]:
        """Kill the commit so many seconds after its first file. Returns what is wrong with the start after that."""
        for attempt in range(TRIES):
            process = self.start_anew()
            time.sleep(wait() * 0.6**attempt)  # what else runs here may have made the measured time too long
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.killpg(process.pid, signal.SIGKILL)
            if process.wait() == -signal.SIGKILL and not self.in_lock():
                break
        else:
            return [f"DVC was about to record the result before it could be killed, {TRIES} times"]
        status = self.start().wait()
        said = self.output.read_text()
        self.output.unlink()
        found = [f"dvc repro ended with status {status}: {said[-2000:]}"] if status else []
        found += [] if "already finished" in said else [f"it computed again: {said[-2000:]}"]
        found += [] if parsed(self.lock) == read_yaml(self.lock_file) else ["dvc.lock differs"]
        self.lock_file.write_bytes(self.lock)
        return found + differences(listing_of(self.project), self.truth)


def without_record(lock_file: Path, lock: bytes, stage: str) -> bytes:
    """Write a dvc.lock as before the stage had run; the record will come at its end. Returns what was written."""
    recorded = parsed(lock)
    del recorded["stages"][stage]
    write_yaml(lock_file, recorded)
    return lock_file.read_bytes()


def killed_in_record(project: Path, stage: str, draw: random.Random) -> list[str]:
    """SIGKILL to DVC while it writes dvc.lock, which it does in place: the file is cut off.

    `make repro` then has its whole records and those of the last commit, and what has run since comes from DVC's run
    cache: nothing is computed again, and all is as before.
    """
    output, lock_file = project.parent / "record.output", project / "dvc.lock"

    def repro(*words: str) -> str:
        output.unlink(missing_ok=True)
        status = start_dvc(project, "repro", *words, output=output).wait()
        assert status == 0, output.read_text()
        return output.read_text()

    repro("--force")  # so that the run cache has all of them
    truth, lock = listing_of(project), lock_file.read_bytes()
    before = without_record(lock_file, lock, stage)
    process = start_dvc(project, "repro", "--single-item", stage, output=output)
    wait_for(lambda: lock_file.stat().st_size < len(before) or process.poll() is not None, PATIENCE, "the record")
    time.sleep(draw.uniform(0, 0.05))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if not is_cut_off(lock_file.read_bytes()):
        return ["DVC had written dvc.lock before it could be killed"]
    mended = subprocess.run(
        [sys.executable, "-m", "stages.tools.mend_lock"], cwd=project, capture_output=True, text=True, check=False
    )
    said = repro()
    found = [] if "dvc.lock was cut off" in mended.stdout else [f"not mended: {mended}"]
    found += [f"it ran again: {line}" for line in said.splitlines() if line.startswith("Running stage")]
    found += [] if parsed(lock) == read_yaml(lock_file) else ["dvc.lock differs"]
    return found + differences(listing_of(project), truth)


@contextlib.contextmanager
def cache_set_aside(project: Path) -> Iterator[None]:
    """DVC's cache is another one meanwhile; then it is as before."""
    cache = project / ".dvc/cache"
    aside = cache.with_name("cache-set-aside")
    cache.rename(aside)
    try:
        yield
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        aside.rename(cache)


def listing_of(project: Path) -> dict[str, str]:
    """The files of the project but DVC's and Git's own, and dvc.lock, whose order of stages may change."""
    ours = listing(project)
    return {name: what for name, what in ours.items() if name.split("/")[0] not in (".dvc", ".git", "dvc.lock")}


def parsed(content: bytes) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(content.decode())


def undisturbed_hash(project: Path, rate: str) -> str:
    """The hash of the model that train_sft makes at an experiment's learning rate, when nothing disturbs it."""
    folder = project.parent / f"undisturbed-{rate}"
    subprocess.run(["git", "clone", "-q", str(project), str(folder)], check=True)
    for name in ("data", "models"):
        subprocess.run(["cp", "-r", "-T", str(project / name), str(folder / name)], check=True)
    key, value = rate.split("=")
    section, entry, group, name = key.split(".")
    change(folder / "params.yaml", {section: {entry: {group: {name: float(value)}}}})
    process = start(folder, SFT)
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    return dvc_hash(folder / outs_of(SFT)[0])


def recorded_hash(project: Path, revision: str) -> str:
    lock = parsed(git(project, "show", f"{revision}:dvc.lock").encode())
    return next(out["md5"] for out in lock["stages"][SFT]["outs"] if out["path"] == "models/sft")


def a_checkpoint(project: Path) -> bool:
    return bool(found_below(project, ".scratch/train_sft@sft-*/code-*/checkpoint-????????"))


def experiments(project: Path) -> set[str]:
    """Refs of finished experiments: refs/exps/<2 digits>/<38 digits of the commit they started from>/<name>."""
    refs = git(project, "for-each-ref", "--format=%(refname)", "refs/exps").split()
    return {ref for ref in refs if re.match(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/", ref)}


def killed_in_temp(project: Path) -> list[str]:
    """`dvc exp run --temp` works in a copy of the project that is then removed: a second one goes on from the first."""
    output = project.parent / "temp.output"
    words = ("exp", "run", "--temp", "-S", OTHER_RATE, SFT)
    before = experiments(project)
    process = start_dvc(project, *words, output=output)
    wait_for(lambda: a_checkpoint(project), PATIENCE, "a checkpoint")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kill_below(project / ".dvc/tmp")
    output.unlink()
    status = start_dvc(project, *words, output=output).wait()
    said = output.read_text()
    if status:
        return [f"dvc exp run ended with status {status}: {said[-2000:]}"]
    found = [] if "resuming from step" in said else [f"it did not resume: {said[-2000:]}"]
    (made,) = experiments(project) - before
    return found + (
        [] if recorded_hash(project, made) == undisturbed_hash(project, OTHER_RATE) else ["the model is another"]
    )


def killed_in_queue(project: Path) -> list[str]:
    """A queue's worker is killed with all it runs; queued and started again, the experiment goes on."""
    output = project.parent / "queue.output"
    queue = ("exp", "run", "--queue", "-S", ANOTHER_RATE, SFT)

    def dvc(*words: str) -> str:
        output.unlink(missing_ok=True)
        status = start_dvc(project, *words, output=output).wait()
        assert status == 0, output.read_text()
        return output.read_text()

    before = experiments(project)
    try:
        dvc(*queue)
        dvc("queue", "start")
        wait_for(lambda: a_checkpoint(project), PATIENCE, "a checkpoint")
        kill_below(project)
        dvc(*queue)
        dvc("queue", "start")
        wait_for(lambda: experiments(project) - before, PATIENCE, "the experiment")
        (made,) = experiments(project) - before
        said = dvc("queue", "logs", made.rsplit("/", 1)[-1])
    finally:
        kill_below(project)
    found = [] if "resuming from step" in said else [f"it did not resume: {said[-2000:]}"]
    return found + (
        [] if recorded_hash(project, made) == undisturbed_hash(project, ANOTHER_RATE) else ["the model is another"]
    )
