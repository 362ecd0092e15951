"""The benchmark itself, on a CPU with a tiny model: every stage is timed, and what fails is a row of the table."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch

from benchmarks import timed_steps
from benchmarks.model_flops import training_flops
from benchmarks.train_throughput import choose, lines_of, run_one
from benchmarks.workloads import WORKLOADS, Configuration, all_configurations
from stages.lib.command.errors import StageError
from tests.pipeline.graph import ROOT

TINY = WORKLOADS["tiny"]


def start(project, *options):
    command = [sys.executable, "-m", "benchmarks.train_throughput", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_stage_is_timed_in_a_process_of_its_own(project, tmp_path):
    names = ["sft+mixed+packing", "rm+lora", "dpo+checkpointing", "ppo", "sft+flash"]
    asked = [option for name in names for option in ("--only", name)]
    done = start(project, "--size", "tiny", "--out", str(tmp_path), *asked)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "results.json").read_text())
    results = report["results"]
    assert set(results) == set(names)
    assert results.pop("sft+flash")["status"] == "not run: flash-attn is not installed"
    assert {name: result["status"] for name, result in results.items()} == dict.fromkeys(results, "measured")
    assert {name: list(result["parts"]) for name, result in results.items()} == {
        "sft+mixed+packing": ["step"],
        "rm+lora": ["step"],
        "dpo+checkpointing": ["step"],
        "ppo": ["step", "rollouts", "update"],
    }
    for name, result in results.items():
        for part in result["parts"].values():
            assert part["tokens"] == [143 if "mixed" in name else 256] * TINY.timed_steps
            assert part["mfu"] is None
            assert part["tokens_per_second"] == pytest.approx(sum(part["tokens"]) / sum(part["step_seconds"]))
        assert 2**27 < result["peak_memory_bytes"] < 2**31
    whole, *parts = results["ppo"]["parts"].values()
    both = zip(*(part["step_seconds"] for part in parts), strict=True)
    assert whole["step_seconds"] == pytest.approx([sum(step) for step in both])
    assert results["dpo+checkpointing"]["runtime"]["gradient_checkpointing"] is True
    assert results["rm+lora"]["parts"]["step"]["model_flops"][0] == training_flops(TINY.architecture, [64] * 4, 0, 16)
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("CPU (")
    stages = ["ppo", "ppo: rollouts", "ppo: update", "dpo", "rm", "sft", "sft"]
    assert [line.split(" | ")[0] for line in table.splitlines()[4:]] == [f"| {stage}" for stage in stages]


def test_out_of_memory_is_a_row_of_the_table(project, tmp_path, monkeypatch):
    """A step that asks for a petabyte, which no machine has."""
    monkeypatch.chdir(project)
    monkeypatch.setitem(timed_steps.PARTS, "sft", lambda _: {"step": lambda: torch.empty(2**50, dtype=torch.uint8)})
    configuration = Configuration("sft", packing=True)
    asked = (json.dumps(asdict(one)) for one in (TINY, configuration))
    timed_steps.main(*asked, "no models", str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "out of memory"
    assert lines_of(configuration, result) == [
        "| sft | all weights | off | packed | sdpa | out of memory | | | |",
    ]


def test_another_failure_is_named(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setitem(timed_steps.PARTS, "sft", lambda setup: {"step": lambda: [][setup.steps]})
    asked = (json.dumps(asdict(one)) for one in (TINY, Configuration("sft")))
    timed_steps.main(*asked, "no models", str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "failed: IndexError: list index out of range"


def test_nothing_is_started_when_time_is_up(tmp_path):
    late = time.monotonic() + 1
    assert run_one(TINY, Configuration("sft"), tmp_path, tmp_path / "log", late) == {"status": "not run: time is up"}


def test_patterns_choose_configurations():
    assert [one.name for one in choose(["rm", "dpo+lora*"])] == ["rm", "dpo+lora", "dpo+lora+checkpointing"]
    names = [one.name for one in all_configurations()]
    assert len(set(names)) == len(names) == 21
    with pytest.raises(StageError, match="--only rmm: no configuration is so named"):
        choose(["sft", "rmm"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "huge"], "--size huge is not one of: qwen2.5-1.5b, tiny"),
        (["--sequences", "3"], "--sequences must be even and at least 2 (a pair is two), found 3"),
        (["--micro-batch-tokens", "0"], "--micro-batch-tokens must be at least 1, found 0"),
        (["--precision", "fp8"], "--precision fp8 is not one of: bf16, fp32"),
    ],
)
def test_a_wrong_option_is_told_at_once(project, options, message):
    done = start(project, *options)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


def test_the_list_comes_without_loading_torch():
    code = "import sys, benchmarks.train_throughput; print([name for name in ('torch', 'peft') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
