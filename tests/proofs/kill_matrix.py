"""Kill every stage that computes, in every way, and compare what it ends with to a run that nothing has disturbed.

Each trial removes a stage's outs and its training state, starts it, kills it once or several times in a row, and then
lets it finish. The whole project folder must then be byte for byte that of the undisturbed run, no file more, and
once dvc.lock holds the result `stages.tools.prune_scratch` must leave no training state. The ways:

- each file operation: SIGKILL just before the n-th file operation, for each n that differs from those before: in the
  middle of a checkpoint, between the renames of two outs, after the last one (`tests/proofs/forked_stage.py`);
- several in a row: three such kills at operations drawn at random, one after the other;
- SIGTERM, SIGINT before operations drawn at random: also exit code 128 + n, one line, no traceback, within seconds;
- random moment: real processes, a signal at a random moment, from the loading of libraries to the end. Under torchrun
  also to one rank alone; and killed on two processes, finished on one under ZeRO 3;
- two processes at chosen operations: in the middle of a save and then between the renames of two outs; after the last
  one (`tests/proofs/hit_process.py`);
- during DVC's commit, in `dvc exp run --temp`, in a queue's worker (`tests/proofs/dvc_kills.py`).

    python -m tests.proofs.kill_matrix --stages train_sft@sft train_ppo@ppo --processes 1 --kills 5 --table matrix.md
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from stages.lib.settings.advantages import ReinforceBaseline
from stages.lib.settings.critic import SharedTrunk
from stages.lib.settings.declaration import block
from stages.lib.settings.kl_controller import AdaptiveKl
from stages.lib.settings.kl_penalty import KlInReward
from stages.lib.settings.policy_loss import GspoLoss
from tests.pipeline.graph import stage_names
from tests.proofs.dvc_kills import SFT, killed_in_commit, killed_in_queue, killed_in_record, killed_in_temp
from tests.proofs.dvc_projects import dvc_project
from tests.proofs.forked_stage import load_libraries, run_forked
from tests.proofs.forked_trials import forked_rows
from tests.proofs.kill_table import Row, added_up, report
from tests.proofs.real_trials import real_rows
from tests.proofs.tiny_projects import SAVING, STAGES, without_outs, write_lock
from tests.stages.tiny_pipeline import change, change_entries, new_project

ON_TWO_PROCESSES = "torchrun --standalone --nproc_per_node=2 -m"
KILLS_IN_COMMIT = 3
LORA = {
    "rank": 4,
    "alpha": 8,
    "targets": "all-linear",
    "experts": False,
    "routers": False,
    "rslora": False,
    "base_quantization": None,
    "save_adapter": True,
}
# Stages again with settings that add to what a checkpoint holds: name → stage and params.
VARIANTS = {
    "train_ppo@ppo, more state": (
        "train_ppo@ppo",
        {
            "lora": LORA,
            "normalise_scores": "running",
            "kl": {"controller": {"type": "adaptive", "coef": 0.05, "target": 1.0, "horizon": 100.0}},
            "policy_optimizer": {"ema_decay": 0.9},
            "entropy_bonus": {"type": "adaptive", "coef": 0.0, "target": 9.0, "step": 0.005},
            "max_policy_kl": 1e-4,
            "ptx": {"coef": 1.0, "batch_size": 8},
            "ptx_tokens": "data/tokens/train/sft.arrow",
            "held_out": {"every": 1, "keep": "best"},
        },
    ),
    "train_ppo@ppo, another reference": ("train_ppo@ppo", {"reference_reset": {"every": 1}}),
    "train_ppo@ppo, one trunk": (
        "train_ppo@ppo",
        {"critic": block(SharedTrunk, publish=True), "samples_per_prompt": 2, "whiten_rewards": True},
    ),
    "train_grpo@grpo, more state": (
        "train_grpo@grpo",
        {
            "advantages": block(ReinforceBaseline),
            "loss": block(GspoLoss),
            "kl": block(KlInReward, controller=block(AdaptiveKl, target=1.0, horizon=100.0)),
            "mask_truncated": True,
            "stop_strings": ["e"],  # or all would be truncated
            "top_entropy_share": 0.5,
            "off_policy_limit": 0.01,
            "optimizer": {"ema_decay": 0.9},
            "held_out": {"every": 1, "keep": "best"},
        },
    ),
    "train_sft@sft, more state": (SFT, {"lora": LORA, "keep": "best", "optimizer": {"ema_decay": 0.9}}),
}


def dvc_rows(truth: Path, work: Path, seed: int) -> list[Row]:
    """Kills of what DVC runs (`tests/proofs/dvc_kills.py`); of each commit, `KILLS_IN_COMMIT`."""
    project = dvc_project(truth, make(work / "dvc") / "project")
    draw = random.Random(seed)
    in_commit = "SIGKILL during DVC's commit"
    kill = partial(killed_in_commit, project, draw=draw, kills=KILLS_IN_COMMIT)
    trials = {(stage, 1, in_commit): partial(kill, stage) for stage in SAVING}
    trials[SFT, 1, "SIGKILL in dvc exp run --temp"] = partial(killed_in_temp, project)
    trials[SFT, 1, "SIGKILL of a dvc queue's worker"] = partial(killed_in_queue, project)
    trials["train_rm@rm", 1, "SIGKILL while DVC writes dvc.lock"] = partial(
        killed_in_record, project, "train_rm@rm", draw
    )
    # The last one: it leaves other bytes behind.
    trials["train_ppo@ppo", 2, in_commit] = partial(kill, "train_ppo@ppo", LAUNCH=ON_TWO_PROCESSES)
    rows = []
    for (stage, processes, method), trial in trials.items():
        started = time.monotonic()
        shutil.rmtree(project / ".scratch", ignore_errors=True)
        try:
            wrong = trial()
        except AssertionError as error:  # what did not come is a failure of this trial, and the others stand
            wrong = [str(error)]
        failures = [f"{stage}, {method}: {text}" for text in wrong]
        kills = KILLS_IN_COMMIT if method == in_commit else 1
        resumed = 0 if wrong else kills
        rows.append(Row(stage, processes, method, kills, kills, resumed, 0.0, time.monotonic() - started, failures))
        print("  ".join(rows[-1].cells()), flush=True)
    return rows


def tiny_truth(folder: Path) -> Path:
    """A project in which every stage has run undisturbed, each in a child: this process computes nothing."""
    new_project(folder)
    for stage in stage_names():
        ended = run_forked(folder, stage)
        if ended.status:
            raise RuntimeError(f"{stage} fails undisturbed: {ended.output[-3000:]}")
    return folder


def copy_for(truth: Path, folder: Path, stage: str = "", settings: dict[str, Any] | None = None) -> Path:
    """A project of its own for the trials of one stage: a checkpoint at every step, and what DVC would have locked.

    With `settings`, its `stage` has run with them.
    """
    shutil.copytree(truth, folder, symlinks=True, ignore=shutil.ignore_patterns(".scratch"))
    change(folder / "runtime.yaml", {"default": {"checkpoint_seconds": 0.0}})
    if settings:
        change_entries(folder, {stage.partition("@")[0]: settings})
        without_outs(folder, stage)
        ended = run_forked(folder, stage)
        if ended.status:
            raise RuntimeError(f"{stage} with {settings} fails undisturbed: {ended.output[-3000:]}")
    write_lock(folder)
    return folder


def main() -> None:
    options = parse()
    end = time.monotonic() + 60 * options.minutes if options.minutes else None
    load_libraries(list(stage_names()))
    shared_memory = Path("/dev/shm")  # where a sync costs nothing
    with tempfile.TemporaryDirectory(dir=shared_memory if os.access(shared_memory, os.W_OK) else None) as name:
        work = Path(name)
        truth = options.truth.resolve() if options.truth else tiny_truth(make(work / "truth"))
        rows: list[Row] = []
        seed = options.seed
        while True:
            rows += one_round(truth, make(work / f"seed-{seed}"), seed, options)
            shutil.rmtree(work / f"seed-{seed}")
            seed += 1
            if end is None or time.monotonic() >= end:
                break
    failures = [failure for row in rows for failure in row.failures]
    report(added_up(rows), failures, options.table, range(options.seed, seed))
    sys.exit(1 if failures else 0)


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def one_round(truth: Path, work: Path, seed: int, options: argparse.Namespace) -> list[Row]:
    """All stages and methods once. Stages run beside each other, as many as there are workers."""

    def of_stage(name: str) -> list[Row]:
        rows = []
        stage, settings = VARIANTS.get(name, (name, None))
        draw = random.Random(f"{seed} {name}")
        if 1 in options.processes:
            folder = copy_for(truth, work / f"{name}-forked", stage, settings)
            rows += forked_rows(folder, stage, options.kills, draw)
            for row in rows:
                row.stage = name
        for processes in options.processes if options.real_kills and not settings else []:
            if processes == 1 or not stage.startswith("tokenize_data"):  # tokenize is one process, always
                folder = copy_for(truth, work / f"{stage}-{processes}")
                rows += real_rows(folder, stage, processes, options.real_kills, draw)
        print("\n".join("  ".join(row.cells()) for row in rows), flush=True)
        return rows

    with ThreadPoolExecutor(options.workers) as pool:
        rows = [row for rows in pool.map(of_stage, options.stages) for row in rows]
    return rows + (dvc_rows(truth, work, seed) if options.dvc_kills else [])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--stages", nargs="+", choices=[*STAGES, *VARIANTS], default=[*STAGES, *VARIANTS])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--kills", type=int, help="file operations tried by each method (default: all that differ)")
    parser.add_argument("--real-kills", type=int, default=1, help="kills in a row of real processes; 0 leaves them out")
    parser.add_argument("--dvc-kills", type=int, default=1, help="0 leaves out the kills of what DVC runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="go on with further seeds until so many minutes are over")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="stages that are tried at a time")
    parser.add_argument("--truth", type=Path, help="a project in which all stages have run (default: make one)")
    parser.add_argument("--table", type=Path, help="Markdown file to write the table to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
