"""Stages killed as DVC runs them: while it commits a result, in `dvc exp run --temp`, in a queue's worker.

Each function starts a stage of a project from `tests/proofs/dvc_projects.py`, kills it, starts it again, and returns
what is wrong with the end, in words.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

from stages.lib.hashing import dvc_hash
from tests.proofs.dvc_projects import git, kill_below, start_dvc, wait_for
from tests.proofs.tiny_projects import differences, found_below, listing, outs_of
from tests.stages.tiny_pipeline import change, read_yaml, start, write_yaml

OTHER_RATE = "train_sft.optimizer.learning_rate=0.0021"
ANOTHER_RATE = "train_sft.optimizer.learning_rate=0.0022"  # or DVC would have the result in its run cache
PATIENCE = 300.0  # seconds that a start may take on a busy machine


def killed_in_commit(project: Path, stage: str, draw: random.Random, **environment: str) -> list[str]:
    """SIGKILL to DVC and all below it after the script has put its outs in place, before dvc.lock holds the result.

    The next `dvc repro` must not compute again, and must end with the same dvc.lock and the same files.
    """
    output = project.parent / "repro.output"
    words = ("repro", "--single-item", "--force", stage)
    if environment:  # on several processes sums are rounded otherwise
        status = start_dvc(project, *words, output=output, **environment).wait()
        assert status == 0, output.read_text()
    truth, lock = listing_of(project), (project / "dvc.lock").read_bytes()
    for _ in range(5):
        others = {name: entry for name, entry in parsed(lock)["stages"].items() if name != stage}
        write_yaml(project / "dvc.lock", {**parsed(lock), "stages": others})
        shutil.rmtree(project / ".scratch", ignore_errors=True)
        process = start_dvc(project, *words, output=output, **environment)
        wait_for(lambda dvc=process: script_is_over(project, dvc), PATIENCE, "the end of the script")
        time.sleep(draw.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if stage not in read_yaml(project / "dvc.lock")["stages"]:
            break
    else:
        return ["DVC had recorded the result before it could be killed, five times"]
    output.unlink()
    status = start_dvc(project, *words, output=output, **environment).wait()
    said = output.read_text()
    output.unlink()
    found = [f"dvc repro ended with status {status}: {said[-2000:]}"] if status else []
    found += [] if "already finished" in said else [f"it computed again: {said[-2000:]}"]
    found += [] if parsed(lock) == read_yaml(project / "dvc.lock") else ["dvc.lock differs"]
    (project / "dvc.lock").write_bytes(lock)
    return found + differences(listing_of(project), truth)


def listing_of(project: Path) -> dict[str, str]:
    """The files of the project but DVC's and Git's own, and dvc.lock, whose order of stages may change."""
    ours = listing(project)
    return {name: what for name, what in ours.items() if name.split("/")[0] not in (".dvc", ".git", "dvc.lock")}


def script_is_over(project: Path, dvc: subprocess.Popen) -> bool:
    """True once the script has logged its run, which it does before it puts its outs in place, and is no more."""
    return (project / ".scratch/runs.jsonl").exists() and not psutil.Process(dvc.pid).children()


def parsed(content: bytes) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(content.decode())


def undisturbed_hash(project: Path, rate: str) -> str:
    """The hash of the model that train_sft makes at an experiment's learning rate, when nothing disturbs it."""
    folder = project.parent / f"undisturbed-{rate}"
    subprocess.run(["git", "clone", "-q", str(project), str(folder)], check=True)
    for name in ("data", "models"):
        subprocess.run(["cp", "-r", "-T", str(project / name), str(folder / name)], check=True)
    key, value = rate.split("=")
    section, group, name = key.split(".")
    change(folder / "params.yaml", {section: {group: {name: float(value)}}})
    process = start(folder, "train_sft")
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    return dvc_hash(folder / outs_of("train_sft")[0])


def recorded_hash(project: Path, revision: str) -> str:
    lock = parsed(git(project, "show", f"{revision}:dvc.lock").encode())
    return next(out["md5"] for out in lock["stages"]["train_sft"]["outs"] if out["path"] == "models/sft")


def a_checkpoint(project: Path) -> bool:
    return bool(found_below(project, ".scratch/train_sft-*/code-*/checkpoint-????????"))


def experiments(project: Path) -> set[str]:
    """Refs of finished experiments: refs/exps/<2 digits>/<38 digits of the commit they started from>/<name>."""
    refs = git(project, "for-each-ref", "--format=%(refname)", "refs/exps").split()
    return {ref for ref in refs if re.match(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/", ref)}


def killed_in_temp(project: Path) -> list[str]:
    """`dvc exp run --temp` works in a copy of the project that is then removed: a second one goes on from the first."""
    output = project.parent / "temp.output"
    words = ("exp", "run", "--temp", "-S", OTHER_RATE, "train_sft")
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
    queue = ("exp", "run", "--queue", "-S", ANOTHER_RATE, "train_sft")

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
