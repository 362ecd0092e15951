"""However a stage is run, it computes the same: on two processes, under every ZeRO, packed, cut, checkpointed."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.loaded_python import torchrun
from tests.proofs.equivalence import MEASURING, SEVERAL_PROCESSES, idle, outside
from tests.proofs.watched_stage import EXPERTS, TRAINING, TWENTY_STEPS
from tests.stages.tiny_pipeline import PROJECT, change_entries
from tests.tiny_experts import save_mixtral

STAGES = (*TRAINING, *MEASURING, "train_sft, experts")
CONFIGURATIONS = ("ZeRO 3, offloaded, packing, checkpointing",)  # `make prove` has the others, and each alone


@pytest.fixture(scope="module")
def measured(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All stages and configurations, in one launch of two processes."""
    folder = tmp_path_factory.mktemp("equivalence")
    shutil.copytree(tiny, folder / "project", symlinks=True, ignore=shutil.ignore_patterns(".scratch"))
    save_mixtral(folder / "project/models/base", folder / "project" / EXPERTS)
    change_entries(folder / "project", TWENTY_STEPS)
    command = [*torchrun().split(), "tests.proofs.equivalence", folder / "project"]
    command += ["--out", folder / "measured.json", "--stages", *STAGES, "--only", *CONFIGURATIONS]
    subprocess.run(command, cwd=PROJECT, check=False, timeout=900)  # it says 1 of a row outside: the tests name it
    return json.loads((folder / "measured.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "configuration"),
    [
        (stage, configuration)
        for stage in STAGES
        for configuration in CONFIGURATIONS
        if not idle(SEVERAL_PROCESSES[configuration], stage)
    ],
)
def test_it_computes_the_same(measured: list[dict[str, Any]], stage: str, configuration: str) -> None:
    (row,) = [row for row in measured if row["stage"] == stage and row["configuration"] == configuration]
    assert outside(row) == {}
    assert row.get("flat weights", 0) < 0.05
    assert row.get("differing rollouts", 0) == 0
