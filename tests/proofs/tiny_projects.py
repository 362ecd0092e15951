"""Projects in which every stage of the tiny pipeline has run, as proofs compare with, to the byte."""

import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path

from stages.lib.command.hashing import dvc_hash, file_hash
from tests.pipeline import graph
from tests.pipeline.graph import computing_stages
from tests.stages.tiny_pipeline import PROJECT, script, stage_options, write_yaml

# Those that are killed.
STAGES = ("tokenize_data@preference", *computing_stages(), "evaluate@ppo")
SAVING = STAGES[1:]  # tokenize keeps nothing


def outs_of(stage: str) -> list[str]:
    """The paths that a stage writes, from dvc.yaml: outs, metrics and plots; of a group that has but one, its."""
    stages = graph.all_instances(graph.load_graph())
    (found,) = [name for name in stages if stage in (name, name.partition("@")[0])]
    return graph.outs_of(stages[found])


def write_lock(folder: Path) -> None:
    """A dvc.lock that holds the hashes of the outs of `STAGES`, as DVC would after their run."""
    entries = {
        stage: {"cmd": stage, "outs": [{"path": path, "md5": dvc_hash(folder / path)} for path in outs_of(stage)]}
        for stage in STAGES
    }
    write_yaml(folder / "dvc.lock", {"schema": "2.0", "stages": entries})


def listing(folder: Path) -> dict[str, str]:
    """Every file (its hash) and folder of a project, hidden ones too, but training state and what is linked in."""
    listed = ((path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*")))
    return {
        name: entry(path)
        for name, path in listed
        if name.split("/")[0] not in (".scratch", "stages", "outputs") and not path.is_symlink()
    }


def entry(path: Path) -> str:
    return file_hash(path) if path.is_file() else "folder"


def half_written(folder: Path, stage: str, truth: dict[str, str]) -> list[str]:
    """In which outs a stage that was killed left something else than an undisturbed run does; none is well, too."""
    found = []
    for out in outs_of(stage):
        there = [path for path in (folder / out, *(folder / out).rglob("*")) if path.exists()]
        if there:
            ours = {path.relative_to(folder).as_posix(): entry(path) for path in there}
            theirs = {name: what for name, what in truth.items() if name == out or name.startswith(f"{out}/")}
            found += [f"after the kill {text}" for text in differences(ours, theirs)]
    return found


def differences(ours: dict[str, str], truth: dict[str, str]) -> list[str]:
    """What is missing, other or too much in `ours`, in words."""
    return [
        f"{name} is {'missing' if name not in ours else 'too much' if name not in truth else 'other'}"
        for name in sorted(ours.keys() | truth.keys())
        if ours.get(name) != truth.get(name)
    ]


def without_outs(folder: Path, stage: str) -> None:
    """Put a project back to before `stage`: DVC removes its outs, and no training state is there."""
    shutil.rmtree(folder / ".scratch", ignore_errors=True)
    remove_outs(folder, stage)


def remove_outs(folder: Path, stage: str) -> None:
    for path in (folder / out for out in outs_of(stage)):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


def start_process(folder: Path, stage: str, processes: int, output: Path, *through: str) -> subprocess.Popen:
    """Start a stage's script as a user does, under torchrun for several processes, in a process group of its own.

    `through`: a module that runs the script, and its arguments before the script's name.
    """
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", f"--nproc_per_node={processes}"]
    launcher = [sys.executable] if processes == 1 else torchrun
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "STAGEWISE_SCRATCH": str(folder / ".scratch")}
    with output.open("ab") as file:
        return subprocess.Popen(
            [*launcher, "-m", *through, f"stages.{script(stage)}", *stage_options(stage)],
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def found_below(folder: Path, pattern: str) -> list[str]:
    """What matches a pattern while a process writes there: `Path.glob` fails if a folder goes while it looks."""
    return glob.glob(pattern, root_dir=folder)  # noqa: PTH207
