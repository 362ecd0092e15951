"""The default run twice, in two clones with nothing of each other: is `dvc.lock` the same, byte for byte?

In both clones, one after the other, `make repro` runs on one process. Then everything is removed again, and
`make train-rm GPUS=2` runs up to the reward model on two. What DVC recorded must be the same in both clones each time.
Then PPO and GRPO with each set of options in `WITH_TERMS`, which the default run leaves out, in two copies of the tiny
pipeline: on one process, and on two.

    python -m tests.proofs.same_bytes FOLDER --table tests/proofs/same_bytes.md
    python -m tests.proofs.same_bytes FOLDER --tiny PROJECT     # the options alone, PROJECT as `equivalence` makes it
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.proofs.dvc_projects import copy_of_project
from tests.proofs.measured_commit import measured_commit
from tests.proofs.tiny_projects import entry, outs_of, start_process
from tests.proofs.watched_stage import WITH_TERMS, make_project, stage_of
from tests.stages.tiny_pipeline import change_entries, read_yaml

CLONES = ("one", "another")
RUNS = (("make", "repro"), ("make", "train-rm", "GPUS=2"))
HEAD = """# Twice, in two folders

`make prove` makes this table again. Each command ran in two clones without data, models, cache or training state, at
the commit in its row. `dvc.lock` holds the hashes of all outs of all stages that ran. The other rows are single stages
of the tiny pipeline with options that the default run leaves out (`WITH_TERMS` of `watched_stage.py`), each in two
copies of it; what was compared is every file that they wrote.

| what ran | commit | outs | both times |
|---|---|---|---|
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
    return cells(f"`{' '.join(command)}`", sum(len(stage["outs"]) for stage in lock.values()), one == another)


def cells(what: str, outs: int, same: bool) -> tuple[str, bool]:
    words = "the same bytes" if same else "DIFFERS"
    return f"| {what} | {measured_commit()} | {outs} | {words} |", same


def row_of_options(tiny: Path, folder: Path, kind: str, processes: int) -> tuple[str, bool]:
    """The same for a stage of the tiny pipeline with some of its options."""
    stage = stage_of(kind)
    outs = outs_of(stage)
    written = []
    for name in CLONES:
        copy = folder / f"{kind}-{processes}-{name}"
        shutil.copytree(tiny, copy, symlinks=True, ignore=shutil.ignore_patterns(".scratch"))
        change_entries(copy, {stage: WITH_TERMS[kind]})
        if start_process(copy, stage, processes, copy.with_suffix(".output")).wait():
            raise SystemExit(f"{kind} failed:\n{copy.with_suffix('.output').read_text()[-3000:]}")
        files = [path for out in outs for path in (copy / out, *(copy / out).rglob("*"))]
        written.append({path.relative_to(copy): entry(path) for path in files})
        shutil.rmtree(copy)
    told = "1 process" if processes == 1 else f"{processes} processes"
    return cells(f"{kind}; {told}", len(outs), written[0] == written[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", type=Path, help="a tiny pipeline that is there: its rows alone")
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True)
    rows = []
    if not options.tiny:
        for name in CLONES:
            copy_of_project(folder / name)
        for command in RUNS:
            rows.append(row_of(folder, command))
            print(rows[-1][0], flush=True)
        make_project(folder / "tiny")
    tiny = options.tiny.resolve() if options.tiny else folder / "tiny"
    for kind in WITH_TERMS:
        for processes in (1, 2):
            rows.append(row_of_options(tiny, folder, kind, processes))
            print(rows[-1][0], flush=True)
    text = HEAD.format(rows="\n".join(line for line, _ in rows))
    if options.table:
        options.table.write_text(text)
    sys.exit(0 if all(same for _, same in rows) else 1)


if __name__ == "__main__":
    main()
