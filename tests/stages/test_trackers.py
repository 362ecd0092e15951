"""Real training with trackers: what they hold is what the curve holds, and what they do changes no output."""

import csv
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.loaded_python import loaded_python
from tests.stages.test_training import outs_of
from tests.stages.tiny_pipeline import ENTRIES, PROJECT, change, read_yaml, start
from tests.tracked_values import (
    tensorboard_hyperparameters,
    tensorboard_scalars,
    wandb_config,
    wandb_rows,
    wandb_summary,
)

Copy = Callable[..., Path]
CHECKPOINT = ".scratch/*/code-*/checkpoint-????????/manifest.json"
BOTH = {"default": {"trackers": ["tensorboard", "wandb"], "checkpoint_seconds": 0.0, "tracker_tags": ["tiny"]}}


def curve_rows(folder: Path, stage: str) -> dict[int, dict[str, float]]:
    with (folder / f"metrics/curves/{ENTRIES[stage]}.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {
        int(row["step"]): {name: float(cell) for name, cell in row.items() if cell and name != "step"} for row in rows
    }


def close_to(value: float) -> object:
    return pytest.approx(value, rel=1e-6, abs=1e-12)  # the curve has 7 digits, TensorBoard float32


def check_performance(values: dict[str, float]) -> None:
    assert 1 < values.pop("perf/tokens_per_second") < 1e7
    assert 100 < values.pop("perf/peak_memory_mib") < 16 * 1024


def check_tensorboard(folder: Path, stage: str) -> None:
    (run,) = (folder / "runs/tensorboard").iterdir()
    scalars = tensorboard_scalars(run)
    results = {name.removeprefix("final/"): scalars.pop(name) for name in list(scalars) if name.startswith("final/")}
    expected = curve_rows(folder, stage)
    last = max(expected)
    metrics = json.loads((folder / f"metrics/training/{ENTRIES[stage]}.json").read_text())
    assert results == {name: [(last, close_to(value))] for name, value in metrics.items()}
    found: dict[int, dict[str, float]] = {}
    for name, points in scalars.items():
        assert len({step for step, _ in points}) == len(points), f"{name} has a step twice"
        for step, value in points:
            found.setdefault(step, {})[name] = value
    for values in found.values():
        check_performance(values)
    assert found == {step: {name: close_to(value) for name, value in row.items()} for step, row in expected.items()}
    params = read_yaml(folder / "params.yaml")
    hyperparameters = tensorboard_hyperparameters(run)
    entry = ENTRIES[stage]
    assert hyperparameters["stage"] == f"{stage}@{entry}"
    assert hyperparameters["seed"] == params["seed"]
    assert hyperparameters[f"{stage}.{entry}.precision"] == params[stage][entry]["precision"]


def check_wandb(folder: Path, stage: str) -> None:
    (file,) = (folder / "runs/wandb").glob("offline-run-*/*.wandb")
    rows = wandb_rows(file)
    expected = curve_rows(folder, stage)
    assert [step for step, _ in rows] == list(expected)
    assert "perf/tokens_per_second" in rows[-1][1]
    for step, values in rows:
        if "perf/tokens_per_second" in values:  # what comes from the curve has none
            check_performance(values)
        assert values == {name: close_to(value) for name, value in expected[step].items()}
    config = wandb_config(file)
    assert config["stage"] == f"{stage}@{ENTRIES[stage]}"
    assert config[f"{stage}.{ENTRIES[stage]}"] == read_yaml(folder / "params.yaml")[stage][ENTRIES[stage]]
    summary = wandb_summary(file)
    for name, value in json.loads((folder / f"metrics/training/{ENTRIES[stage]}.json").read_text()).items():
        assert summary[f"final/{name}"] == value


def wait_for(folder: Path, pattern: str, process: subprocess.Popen) -> None:
    """Until a file is there; the process must not have ended."""
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_tracked_whole_and_once(copy_of_tiny: Copy, tiny: Path) -> None:
    folder, stage = copy_of_tiny(), "train_ppo"
    change(folder / "runtime.yaml", BOTH)
    process = start(folder, stage)
    wait_for(folder, CHECKPOINT, process)
    wait_for(folder, "runs/tensorboard/*/events*", process)
    process.kill()
    process.communicate()
    first = {path.name for path in (folder / "runs/tensorboard").iterdir()}
    process = start(folder, stage)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "resuming from step" in output
    assert "warning" not in errors
    assert {path.name for path in (folder / "runs/tensorboard").iterdir()} == first
    check_tensorboard(folder, stage)
    check_wandb(folder, stage)
    assert outs_of(folder, stage) == outs_of(tiny, stage)


@pytest.mark.slow
def test_a_tracker_that_fails_is_told_once_and_changes_nothing(copy_of_tiny: Copy, tiny: Path) -> None:
    folder = copy_of_tiny()
    change(folder / "runtime.yaml", BOTH)
    process = start(folder, "train_sft")
    wait_for(folder, "runs/tensorboard/*/events*", process)
    (folder / "runs").rename(folder / "moved")
    (folder / "runs").write_text("in the way")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert errors.count("warning:") == 2, errors
    for name in ("tensorboard", "wandb"):
        assert errors.count(f"tracking with {name} failed, the run goes on without it") == 1
    assert "Traceback" not in errors
    assert outs_of(folder, "train_sft") == outs_of(tiny, "train_sft")
    assert (folder / "runs").read_text() == "in the way"


@pytest.mark.slow
def test_a_run_without_trackers_imports_none(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    change(folder / "runtime.yaml", {"default": {"trackers": ["wandb"], "wandb_mode": "disabled"}})
    code = (
        "import sys; from pathlib import Path; from tests.stages.tiny_pipeline import call\n"
        "call(Path(sys.argv[1]), 'train_rm')\n"
        "print({'wandb', 'tensorboard'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [*loaded_python(environment), "-c", code, folder], env=environment, cwd=PROJECT, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "set()", done.stderr
    assert not (folder / "runs").exists()
