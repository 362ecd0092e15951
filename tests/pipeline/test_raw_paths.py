"""The user's path of raw data through a real `dvc repro`: whatever it is called, it is read, and no shell runs it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stages.data_stages import sources_of, write_rows
from tests.stages.tiny_pipeline import PROJECT, new_project, read_yaml, write_yaml

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
    shutil.copytree(PROJECT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache"))
    subprocess.run([sys.executable, "-m", "dvc", "config", "--local", "core.no_scm", "true"], cwd=folder, check=True)
    return folder


def repro(folder: Path, path: str, stage: str = "read_source@own") -> subprocess.CompletedProcess:
    """Run one stage by DVC, with one source at `path`."""
    sources = sources_of(files={"own": {"path": path, "kinds": ["sft", "preference", "prompts"]}})
    write_yaml(folder / "params.yaml", read_yaml(folder / "params.yaml") | {"sources": sources})
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "STAGEWISE_SCRATCH": str(folder / ".scratch")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", stage]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_any_name_is_read_and_tracked(project: Path, name: str) -> None:
    path = f"data/raw/{name}"
    rows = [{"prompt": f"{name} {number}", "chosen": "yes", "rejected": "no"} for number in range(6)]
    write_rows(project / path, rows)
    for stage in ("read_source@own", "prepare_data"):
        done = repro(project, path, stage)
        assert done.returncode == 0, done.stdout + done.stderr
    lines = (project / "data/prepared/train/prompts.jsonl").read_text().splitlines()
    assert {json.loads(line)["prompt"][0]["content"] for line in lines} < {row["prompt"] for row in rows}
    locked = read_yaml(project / "dvc.lock")["stages"]["read_source@own"]
    assert path in [dep["path"] for dep in locked["deps"]]
    assert not list(project.rglob("pwned"))


@pytest.mark.slow
def test_a_path_that_is_a_command_is_run_by_nothing(project: Path) -> None:
    write_rows(project / "data/raw/x.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])  # where it leads
    done = repro(project, INJECTION)
    assert done.returncode != 0
    told = "error: params.yaml: sources.files.own: path must"
    assert [line for line in done.stderr.splitlines() if line.startswith(told)]
    assert not list(project.rglob("pwned"))
