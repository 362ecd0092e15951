"""The whole graph, tiny, through `make repro` in a fresh checkout: it ends in a report; a second run does nothing."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.loaded_python import loaded_python
from tests.stages.tiny_pipeline import TINY, change

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked and the new files of this project in a new Git and DVC repository, with tiny settings."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=PROJECT, capture_output=True
    )
    assert listed.returncode == 0, listed.stderr
    for name in listed.stdout.decode().split("\0"):
        source = PROJECT / name
        is_result = name == "dvc.lock" or (name.startswith("metrics/") and source.name != ".gitkeep")
        if name and source.is_file() and not is_result:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)  # with its time, or make would set up .venv anew
    (folder / ".venv").symlink_to(PROJECT / ".venv")
    change(folder / "params.yaml", TINY)
    change(folder / "runtime.yaml", {"default": {"threads": 1}})  # more gain nothing at this size
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "LAUNCH")}
    environment["LAUNCH"] = " ".join([*loaded_python(), "-m"])
    environment["STAGEWISE_SCRATCH"] = str(folder / ".scratch")
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def with_smoothing(params: str) -> str:
    """The text of params.yaml with another setting of train_dpo."""
    before, dpo = params.split("\ntrain_dpo:")
    return f"{before}\ntrain_dpo:{dpo.replace('label_smoothing: 0.0', 'label_smoothing: 0.1', 1)}"


@pytest.mark.slow
def test_the_whole_graph_runs_and_a_second_run_does_nothing(checkout: Path) -> None:
    first = make(checkout, "repro")
    assert first.returncode == 0, first.stdout + first.stderr
    assert (checkout / "metrics/report.html").is_file()
    lock = (checkout / "dvc.lock").read_bytes()

    second = make(checkout, "repro")
    assert second.returncode == 0
    assert "Running stage" not in second.stdout
    assert (checkout / "dvc.lock").read_bytes() == lock

    left_behind = [path for path in checkout.rglob("*.partial") if ".venv" not in path.parts]
    assert left_behind == []
    assert sorted(path.name for path in (checkout / ".scratch").iterdir()) == ["runs.jsonl"]


@pytest.mark.slow
def test_a_setting_makes_stale_its_stage_and_what_follows_alone(checkout: Path) -> None:
    text = (checkout / "params.yaml").read_text()
    (checkout / "params.yaml").write_text(with_smoothing(text))
    runtime = (checkout / "runtime.yaml").read_text()
    (checkout / "runtime.yaml").write_text(runtime.replace("packing: false", "packing: true", 1))
    status = make(checkout, "status")
    (checkout / "params.yaml").write_text(text)
    (checkout / "runtime.yaml").write_text(runtime)
    stale = {line.rstrip(":") for line in status.stdout.splitlines() if line.endswith(":") and line[0] not in " \t"}
    # The first stage, which checks both files, and the report, which names what is trained; what follows train_dpo is
    # stale once its outs have changed.
    assert stale == {"code_manifest", "train_dpo@dpo", "report"}


@pytest.mark.slow
def test_old_settings_put_back_are_restored_without_training(checkout: Path) -> None:
    text, runs = (checkout / "params.yaml").read_text(), checkout / ".scratch/runs.jsonl"
    outs = ("dvc.lock", "models/dpo/model.safetensors", "metrics/training/dpo.json", "metrics/curves/dpo.csv")
    before = {out: (checkout / out).read_bytes() for out in outs}
    count = len(runs.read_text().splitlines())

    (checkout / "params.yaml").write_text(with_smoothing(text))
    other = make(checkout, "train-dpo")
    assert other.returncode == 0, other.stdout + other.stderr
    assert {out for out in outs if (checkout / out).read_bytes() == before[out]} == set()
    (*_, last) = runs.read_text().splitlines()
    assert len(runs.read_text().splitlines()) == count + 1
    assert json.loads(last)["stage"] == "train_dpo@dpo"

    (checkout / "params.yaml").write_text(text)
    back = make(checkout, "train-dpo")
    assert back.returncode == 0, back.stdout + back.stderr
    assert "Stage 'train_dpo@dpo' is cached - skipping run, checking out outputs" in back.stdout
    assert {out: (checkout / out).read_bytes() for out in outs} == before
    assert len(runs.read_text().splitlines()) == count + 1  # nothing has run
