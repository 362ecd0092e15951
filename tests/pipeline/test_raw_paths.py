"""The user's path of raw data through a real `dvc repro`: whatever it is called, it is read, and no shell runs it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stages.data_stages import use_source
from tests.stages.tiny_pipeline import PROJECT, new_project, read_yaml

NAMES = [
    "my data.jsonl",
    "train (1).jsonl",
    "it's.jsonl",
    "a$b.jsonl",
    "a${b}.jsonl",
    "`touch pwned`.jsonl",
    "-x.jsonl",
]
INJECTION = "$(touch pwned)/../data/raw/x.jsonl"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = new_project(tmp_path_factory.mktemp("project"))
    (folder / "data/raw").mkdir(parents=True)
    shutil.copytree(PROJECT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache"))
    subprocess.run([sys.executable, "-m", "dvc", "config", "--local", "core.no_scm", "true"], cwd=folder, check=True)
    return folder


def repro(folder: Path, path: str, name: str = "mine") -> subprocess.CompletedProcess:
    use_source(folder, {"path": path, "kinds": ["prompts"]}, name)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "STAGEWISE_SCRATCH": str(folder / ".scratch")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", "read_source"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_any_name_is_read_and_tracked(project: Path, name: str) -> None:
    path = f"data/raw/{name}"
    rows = [{"prompt": f"{name} {number}"} for number in range(6)]
    (project / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = repro(project, path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (project / "data/sources/mine/rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"][0]["content"] for line in lines] == [row["prompt"] for row in rows]
    locked = read_yaml(project / "dvc.lock")["stages"]["read_source@mine"]
    assert path in [dep["path"] for dep in locked["deps"]]
    assert not list(project.rglob("pwned"))


@pytest.mark.slow
def test_a_path_that_is_a_command_is_run_by_nothing(project: Path) -> None:
    done = repro(project, INJECTION)
    assert done.returncode != 0
    assert "No such file or directory" in done.stderr, done.stdout + done.stderr
    assert not list(project.rglob("pwned"))


@pytest.mark.slow
def test_a_name_that_is_a_command_is_run_by_nothing(project: Path) -> None:
    done = repro(project, "data/raw/it's.jsonl", "$(touch pwned)")
    assert done.returncode != 0
    assert not list(project.rglob("pwned"))
