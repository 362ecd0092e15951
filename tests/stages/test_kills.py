"""One seeded schedule of kills for some stages; the whole matrix is `make prove`, the long one `make soak`."""

import os
import random
import subprocess
from pathlib import Path

import pytest

from tests.loaded_python import loaded_python
from tests.proofs.dvc_kills import killed_in_commit
from tests.proofs.dvc_projects import dvc_project
from tests.stages.tiny_pipeline import PROJECT

STAGES = ("tokenize_data@preference", "train_rm@rm", "ref_logprobs@sft", "train_grpo@grpo")
# With adapters, adaptive coefficients of KL and entropy, running moments of the scores, averaged weights, steps back.
WITH_MORE_STATE = "train_ppo@ppo, more state"


@pytest.mark.slow
def test_a_stage_killed_several_times_in_a_row_ends_as_if_it_had_never_been(tiny: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    stages = ["--stages", *STAGES, WITH_MORE_STATE]
    words = [*stages, "--truth", tiny, "--processes", "1", "--kills", "0", "--real-kills", "0", "--dvc-kills", "0"]
    done = subprocess.run(
        [*loaded_python(), "-m", "tests.proofs.kill_matrix", *words, "--seed", "3", "--workers", "2", "--table", table],
        cwd=PROJECT,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},  # trials share the cores; a thread that waits need not spin
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in table.read_text().splitlines() if line.startswith("| ")][2:]
    assert {row[0].removeprefix("| ") for row in rows} == {*STAGES, WITH_MORE_STATE}
    resumed = {row[0].removeprefix("| ") for row in rows if "in a row" in row[2] and int(row[5])}
    # The kills of a stage without training may all be drawn before it has kept anything; test_resume has it resumed.
    assert {stage for stage in (*STAGES, WITH_MORE_STATE) if stage.startswith("train_")} <= resumed
    assert resumed <= {*STAGES[1:], WITH_MORE_STATE}  # tokenize_data keeps nothing of so few rows
    # Three kills in a row, of which one may come after the end, and a signal.
    assert sum(int(row[4]) for row in rows) >= 2 * len(STAGES)


@pytest.mark.slow
def test_a_kill_while_dvc_commits_costs_nothing(tiny: Path, tmp_path: Path) -> None:
    project = dvc_project(tiny, tmp_path / "project")
    assert killed_in_commit(project, "train_rm@rm", random.Random(7), kills=1) == []
