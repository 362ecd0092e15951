"""The default run twice, in two clones with nothing of each other: is `dvc.lock` the same, byte for byte?

In both clones, one after the other, `make repro` runs on one process. Then everything is removed again, and
`make train-rm GPUS=2` runs up to the reward model on two. What DVC recorded must be the same in both clones each time.

    python -m tests.proofs.same_bytes FOLDER --table tests/proofs/same_bytes.md
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.proofs.dvc_projects import copy_of_project
from tests.proofs.measured_commit import measured_commit
from tests.stages.tiny_pipeline import read_yaml

CLONES = ("one", "another")
RUNS = (("make", "repro"), ("make", "train-rm", "GPUS=2"))
HEAD = """# Twice, in two folders

`make prove` makes this table anew. Measured at commit {commit}: each command ran in two clones without data, models,
cache or training state. `dvc.lock` holds the hashes of all outs of all stages that ran.

| command | outs | dvc.lock |
|---|---|---|
{rows}
"""


def run_from_nothing(clone: Path, command: tuple[str, ...]) -> bytes:
    """Run `command` in a clone that has nothing but what is committed, without dvc.lock. Returns the new dvc.lock."""
    subprocess.run(["git", "checkout", "--quiet", "."], cwd=clone, check=True)
    subprocess.run(["git", "clean", "-xdffq", "-e", ".venv"], cwd=clone, check=True)
    (clone / "dvc.lock").unlink()
    for lock in clone.glob("requirements*.lock"):
        os.utime(lock, (0, 0))  # or make would take the environment for outdated
    hidden = ("LAUNCH", "MAKEFLAGS", "STAGEWISE_SCRATCH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    subprocess.run(command, cwd=clone, env=environment, check=True, stdout=subprocess.DEVNULL)
    return (clone / "dvc.lock").read_bytes()


def row_of(folder: Path, command: tuple[str, ...]) -> tuple[str, bool]:
    """A line of the table, and whether both clones have the same dvc.lock."""
    one, another = (run_from_nothing(folder / name, command) for name in CLONES)
    lock = read_yaml(folder / CLONES[0] / "dvc.lock")["stages"]
    outs = sum(len(stage["outs"]) for stage in lock.values())
    same = one == another
    words = "the same bytes" if same else "DIFFERS"
    return f"| `{' '.join(command)}` | {outs} | {words} |", same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True)
    for name in CLONES:
        copy_of_project(folder / name)
    rows = []
    for command in RUNS:
        rows.append(row_of(folder, command))
        print(rows[-1][0], flush=True)
    text = HEAD.format(commit=measured_commit(), rows="\n".join(line for line, _ in rows))
    if options.table:
        options.table.write_text(text)
    sys.exit(0 if all(same for _, same in rows) else 1)


if __name__ == "__main__":
    main()
