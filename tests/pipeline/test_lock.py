"""dvc.lock and the metrics in Git belong to the code and the settings in Git.

Checked in a folder that may have no data, no models and no DVC cache, as a fresh clone has none.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.pipeline.graph import ROOT, all_instances, load_graph


def load_lock(root: Path) -> dict[str, Any]:
    assert (root / "dvc.lock").is_file(), "dvc.lock is missing: run `make repro` and commit it with metrics/"
    return YAML(typ="safe").load((root / "dvc.lock").read_text(encoding="utf-8"))["stages"]


def dvc(root: Path, *arguments: str) -> str:
    """Run DVC in a folder; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def differences(root: Path) -> set[tuple[str, str]]:
    """(stage, what) for each file in Git, params key or command that is not as it was when the stage ran.

    Data and models are not in Git and are left out, here or not.
    """
    found = set()
    for stage, entries in json.loads(dvc(root, "status", "--json")).items():
        for entry in entries:
            changes = {entry: entry} if isinstance(entry, str) else {**next(iter(entry.values()))}
            params = changes.pop("params.yaml", {})
            found |= {(stage, f"params.yaml:{key}") for key in params}
            found |= {(stage, path) for path in changes if not path.startswith(("data/", "models/"))}
    return found


def broken_links(root: Path) -> list[tuple[str, str]]:
    """(stage, dep) where the stage was run on something else than what the stage that makes it wrote last."""
    lock = load_lock(root)
    made = {out["path"]: out["md5"] for stage in lock.values() for out in stage.get("outs", [])}
    return [
        (name, dep["path"])
        for name, stage in lock.items()
        for dep in stage.get("deps", [])
        if dep["md5"] != made.get(dep["path"], dep["md5"])
    ]


def test_the_lock_has_every_stage_and_no_other():
    assert set(load_lock(ROOT)) == set(all_instances(load_graph(ROOT)))


def test_code_settings_and_metrics_are_those_of_the_lock():
    load_lock(ROOT)
    assert differences(ROOT) == set()


def test_every_stage_was_run_on_what_the_stages_before_it_wrote():
    assert broken_links(ROOT) == []


# The checks themselves, on a project of two stages, as it is in a fresh clone.

GRAPH = """\
stages:
  make:
    cmd: mkdir -p data && cp code.txt data/rows && echo ${make.rows} > metrics/make.json
    deps: [code.txt]
    params: [make]
    outs: [data/rows]
    metrics:
      - metrics/make.json:
          cache: false
  use:
    matrix:
      kind: [a, b]
    cmd: cp data/rows metrics/${item.kind}.csv
    deps: [data/rows, tool.txt]
    params: [seed]
    plots:
      - metrics/${item.kind}.csv:
          cache: false
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    dvc(root, "init", "--quiet")
    dvc(root, "config", "core.analytics", "false")
    files = {
        "dvc.yaml": GRAPH,
        "params.yaml": "seed: 1\nmake:\n  rows: 2\n",
        "code.txt": "code\n",
        "tool.txt": "tool\n",
    }
    for name, text in files.items():
        (root / name).write_text(text)
    (root / "metrics").mkdir()
    dvc(root, "repro")
    shutil.rmtree(root / "data")
    shutil.rmtree(root / ".dvc/cache")
    return root


@pytest.fixture
def clone(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "clone")


def test_a_clone_without_data_passes(clone):
    assert set(load_lock(clone)) == {"make", "use@a", "use@b"}
    assert differences(clone) == set()
    assert broken_links(clone) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "found"),
    [
        ("code.txt", "code", "other code", {("make", "code.txt")}),
        ("tool.txt", "tool", "other tool", {("use@a", "tool.txt"), ("use@b", "tool.txt")}),
        ("params.yaml", "rows: 2", "rows: 3", {("make", "params.yaml:make"), ("make", "changed command")}),
        ("params.yaml", "seed: 1", "seed: 2", {("use@a", "params.yaml:seed"), ("use@b", "params.yaml:seed")}),
        ("dvc.yaml", "cp data", "cp -p data", {("use@a", "changed command"), ("use@b", "changed command")}),
        ("metrics/a.csv", "code", "by hand", {("use@a", "metrics/a.csv")}),
    ],
)
def test_a_change_of_what_is_in_git_is_found(clone, file, old, new, found):
    path = clone / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert differences(clone) == found


def test_a_missing_metric_is_found(clone):
    (clone / "metrics/make.json").unlink()
    assert differences(clone) == {("make", "metrics/make.json")}


def test_a_stage_run_on_an_older_out_is_found(clone):
    lock = clone / "dvc.lock"
    (rows,) = {out["md5"] for out in load_lock(clone)["make"]["outs"] if out["path"] == "data/rows"}
    head, tail = lock.read_text().split("  use@a:\n")
    lock.write_text(f"{head}  use@a:\n{tail.replace(rows, '0' * 32, 1)}")
    assert broken_links(clone) == [("use@a", "data/rows")]


def test_a_missing_lock_is_found(clone):
    (clone / "dvc.lock").unlink()
    with pytest.raises(AssertionError, match=r"dvc\.lock is missing"):
        load_lock(clone)
