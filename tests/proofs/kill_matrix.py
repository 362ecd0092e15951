"""Kill every stage that computes, in every way, and compare what it ends with to a run that nothing has disturbed.

Each trial removes a stage's outs and its training state, starts it, kills it once or several times in a row, and then
lets it finish. The whole project folder must then be byte for byte that of the undisturbed run, no file more, and
once dvc.lock holds the result `stages.prune_scratch` must leave no training state. The ways:

- each file operation: SIGKILL just before the n-th file operation, for each n that differs from those before: in the
  middle of a checkpoint, between the renames of two outs, after the last one (`tests/proofs/forked_stage.py`);
- several in a row: three such kills at operations drawn at random, one after the other;
- SIGTERM, SIGINT before operations drawn at random: also exit code 128 + n, one line, no traceback, within seconds;
- random moment: real processes, a signal at a random moment, from the loading of libraries to the end. Under torchrun
  also to one rank alone; and killed on two processes, finished on one;
- during DVC's commit, in `dvc exp run --temp`, in a queue's worker (`tests/proofs/dvc_kills.py`).

    python -m tests.proofs.kill_matrix --stages train_sft train_ppo --processes 1 --kills 5 --table matrix.md
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from stages.lib.token_tables import REFERENCE_SCHEMA, read_table
from tests.proofs.dvc_kills import killed_in_commit, killed_in_queue, killed_in_temp
from tests.proofs.dvc_projects import dvc_project
from tests.proofs.forked_stage import kill_points, load_libraries, prune_forked, run_forked
from tests.proofs.kill_table import Row, added_up, report
from tests.proofs.tiny_projects import (
    differences,
    listing,
    outs_of,
    remove_outs,
    start_process,
    without_outs,
    write_lock,
)
from tests.stages.conftest import STAGES as ALL_STAGES
from tests.stages.tiny_pipeline import change, new_project

STAGES = ("tokenize@preference", "train_sft", "train_rm", "ref_logprobs", "train_dpo", "train_ppo", "evaluate@ppo")
LORA = {"rank": 4, "alpha": 8, "targets": "all-linear", "rslora": False, "base_quantization": None}
LORA["save_adapter"] = True
# Stages again with settings that add to what a checkpoint holds: name → stage and params.
VARIANTS = {
    "train_ppo, more state": (
        "train_ppo",
        {
            "lora": LORA,
            "normalise_scores": True,
            "kl_controller": "adaptive",
            "kl_target": 1.0,
            "kl_horizon": 100.0,
            "policy_optimizer": {"ema_decay": 0.9},
        },
    ),
    "train_sft, more state": ("train_sft", {"lora": LORA, "keep": "best", "optimizer": {"ema_decay": 0.9}}),
}
STOPS = (signal.SIGTERM, signal.SIGINT)
SLOWEST_EXIT = 20.0  # seconds from a signal to the end of a tiny stage; launchers kill after 30
SLOWEST_LOSS_OF_A_RANK = 45.0  # seconds from the death of one rank to the end of all: torchrun waits 30 for the others
RESUMED = ("resuming", "already finished")


class Trials:
    """The trials of one stage in one project folder, whose undisturbed state is `truth`."""

    def __init__(self, folder: Path, stage: str, draw: random.Random) -> None:
        self.folder, self.stage, self.draw = folder, stage, draw
        self.truth = listing(folder)
        without_outs(folder, stage)
        whole = run_forked(folder, stage)
        self.operations = whole.operations
        self.undisturbed = [*self.what_is_wrong(whole.status, whole.output)]

    def what_is_wrong(self, status: int, output: str) -> list[str]:
        """Everything in which a finished trial differs from an undisturbed run."""
        if status != 0:
            return [f"ended with status {status}: {output[-2000:]}"]
        found = differences(listing(self.folder), self.truth)
        pruned = prune_forked(self.folder)
        root = self.folder / ".scratch"
        left = [path.name for path in root.iterdir() if path.name != "runs.jsonl"] if root.is_dir() else []
        if pruned.status or left:
            found.append(f"after prune_scratch {left} is left {pruned.output}")
        return found

    def forked(self, row: Row, points: Iterable[int], number: int) -> None:
        """Hit a fresh run before each operation of `points`, one start after the other, then let it finish."""
        started = time.monotonic()
        without_outs(self.folder, self.stage)
        row.trials += 1
        wrong = []
        hit_before = False
        for point in points:
            remove_outs(self.folder, self.stage)  # as DVC does before each start
            ended = run_forked(self.folder, self.stage, point, number)
            row.resumed += hit_before and any(word in ended.output for word in RESUMED)
            if ended.status == 0 and point > len(ended.operations):
                continue  # it was over before
            row.kills += 1
            hit_before = True
            if number != signal.SIGKILL:
                row.slowest_exit = max(row.slowest_exit, ended.seconds_after_signal)
                wrong += self.wrong_exit(ended.status, ended.output, number, ended.seconds_after_signal)
            elif ended.status != -signal.SIGKILL:
                wrong.append(f"ended with status {ended.status} on SIGKILL")
        remove_outs(self.folder, self.stage)
        last = run_forked(self.folder, self.stage)
        row.resumed += any(word in last.output for word in RESUMED)
        wrong += self.what_is_wrong(last.status, last.output)
        row.failures += [f"{row.stage}, {row.method}, before operations {list(points)}: {text}" for text in wrong]
        row.seconds += time.monotonic() - started

    def wrong_exit(self, status: int, output: str, number: int, seconds: float) -> list[str]:
        """What is not as promised in the end of a run that got SIGTERM or SIGINT."""
        found = [f"ended with status {status} on signal {number}"] if status != 128 + number else []
        return found + wrong_words(output, seconds)


def wrong_words(output: str, seconds: float) -> list[str]:
    found = []
    if output.count("stopped by SIG") != 1 or "Traceback" in output:
        found.append(f"a stop is not told in one line: {output[-2000:]}")
    if seconds > SLOWEST_EXIT:
        found.append(f"took {seconds:.1f} s to end after a signal")
    return found


class RealTrials:
    """Trials with real processes: `processes` of them, under torchrun if that is more than one."""

    def __init__(self, folder: Path, stage: str, processes: int, draw: random.Random) -> None:
        self.folder, self.stage, self.processes, self.draw = folder, stage, processes, draw
        self.output = folder.parent / f"{folder.name}.output"
        self.seconds = self.make_truth()
        self.truth = listing(folder)

    def make_truth(self) -> float:
        """Run undisturbed: on two processes sums are rounded otherwise than on one."""
        without_outs(self.folder, self.stage)
        started = time.monotonic()
        status, output = self.finish()
        if status != 0:
            raise RuntimeError(f"{self.stage} on {self.processes} processes fails undisturbed: {output[-3000:]}")
        write_lock(self.folder, list(STAGES))
        return time.monotonic() - started

    def finish(self) -> tuple[int, str]:
        self.output.unlink(missing_ok=True)
        status = start_process(self.folder, self.stage, self.processes, self.output).wait()
        return status, self.output.read_text()

    def trial(self, row: Row, kills: int, kill: Callable[[subprocess.Popen], None]) -> None:
        """Start, `kill` at a random moment, `kills` times, then let it finish and compare."""
        started = time.monotonic()
        without_outs(self.folder, self.stage)
        row.trials += 1
        wrong: list[str] = []
        hit_before = False
        for _ in range(3 * kills):
            remove_outs(self.folder, self.stage)
            self.output.unlink(missing_ok=True)
            process = start_process(self.folder, self.stage, self.processes, self.output)
            if not self.moment_came(process):
                without_outs(self.folder, self.stage)  # it was over before: from the beginning, and sooner
                self.seconds *= 0.7
                hit_before = False
                continue
            row.kills += 1
            kills -= 1
            asked = time.monotonic()
            kill(process)
            process.wait()
            took = time.monotonic() - asked
            row.slowest_exit = max(row.slowest_exit, took)
            output = self.output.read_text()
            row.resumed += hit_before and any(word in output for word in RESUMED)
            hit_before = True
            wrong += self.wrong_end(row.method, process.returncode, output, took)
            end_group(process)
            if not kills:
                break
        remove_outs(self.folder, self.stage)
        status, output = self.finish()
        row.resumed += any(word in output for word in RESUMED)
        wrong += [f"ended with status {status}: {output[-2000:]}"] if status else []
        wrong += differences(listing(self.folder), self.truth)
        wrong += [] if row.resumed or self.processes == 1 else ["nothing that was saved was used"]
        row.failures += [f"{row.stage}, {self.processes} processes, {row.method}: {text}" for text in wrong]
        row.seconds += time.monotonic() - started

    def moment_came(self, process: subprocess.Popen) -> bool:
        """Wait for a random moment, mostly after libraries are loaded; False if the process ended before.

        Two processes need seconds to meet, in which there is nothing to lose: there it is one after the first save.
        """
        share = self.draw.random()
        if self.processes > 1:
            while process.poll() is None and not saved_something(self.folder):
                time.sleep(0.005)
            time.sleep(share)
            return process.poll() is None
        wait = self.seconds * (share if self.draw.random() < 0.25 else 0.55 + 0.45 * share)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            return True
        return False

    def wrong_end(self, method: str, status: int, output: str, seconds: float) -> list[str]:
        number = next((number for number in STOPS if number.name in method), None)
        if status == 0:
            return []  # it was just over
        if method == ONE_RANK:
            found = [] if seconds < SLOWEST_LOSS_OF_A_RANK else [f"took {seconds:.1f} s to end after a rank was lost"]
            return found + ([] if "Signal 9" in output or "exitcode: -9" in output.replace(" ", "") else ["not told"])
        if number is None:
            return []
        if self.processes == 1:
            # Before Python has come to the script's first lines, the system ends it by the signal itself.
            if status == -number or (number == signal.SIGINT and "stopped by" not in output and not_begun(output)):
                return []
            expected = [] if status == 128 + number else [f"ended with status {status} on signal {number}"]
            return expected + wrong_words(output, seconds)
        found = [f"took {seconds:.1f} s to end after a signal"] if seconds > SLOWEST_EXIT else []
        return found + ([f"told {output.count('stopped by SIG')} times"] if output.count("stopped by SIG") > 1 else [])


def not_begun(output: str) -> bool:
    return "KeyboardInterrupt" in output and "stages/lib" not in output


def other_processes_row(trials: RealTrials) -> Row:
    """Two processes are killed, and one finishes, under ZeRO 3: the files are those of two but for rounding."""
    folder, stage = trials.folder, trials.stage
    runtime = (folder / "runtime.yaml").read_text()
    row = Row(stage, 2, OTHER_NUMBER, trials=1)
    started = time.monotonic()
    truth = numbers_of(folder, stage)
    without_outs(folder, stage)
    trials.output.unlink(missing_ok=True)
    process = start_process(folder, stage, 2, trials.output)
    while process.poll() is None and not saved_something(folder):
        time.sleep(0.005)
    row.kills += process.poll() is None
    end_group(process)
    process.wait()
    remove_outs(folder, stage)
    trials.output.unlink()
    change(folder / "runtime.yaml", {"default": {"zero_stage": 3, "frozen_zero_stage": 3}})
    status = start_process(folder, stage, 1, trials.output).wait()
    (folder / "runtime.yaml").write_text(runtime)
    output = trials.output.read_text()
    row.resumed = int(any(word in output for word in RESUMED))
    if status or not row.resumed:
        row.failures.append(f"{stage}: one process does not go on from the state of two: {output[-2000:]}")
    elif sorted(listing(folder)) != sorted(trials.truth) or not close(numbers_of(folder, stage), truth):
        row.failures.append(f"{stage}: gone on on one process, the result is not that of two")
    row.seconds = time.monotonic() - started
    return row


def saved_something(folder: Path) -> bool:
    saved = (*folder.glob(".scratch/*/checkpoint-????????"), *folder.glob(".scratch/*/kept/*.json"))
    return len(saved) > 1


def numbers_of(folder: Path, stage: str) -> list[float]:
    """Every number in the metrics of a stage, in the table that it writes, and the tokens of its rollouts."""
    found: list[float] = []
    for path in (folder / out for out in outs_of(stage)):
        if path.suffix == ".json":
            found += json.loads(path.read_text()).values()
        elif path.name == "ref_logprobs":
            table = read_table(path / "train.arrow", REFERENCE_SCHEMA)
            found += table["reference_chosen_logps"][:] + table["reference_rejected_logps"][:]
        elif path.name == "train_ppo":
            for line in (path / "rollouts.jsonl").read_text().splitlines():
                found += json.loads(line)["response_ids"]
    return found


def close(ours: list[float], theirs: list[float]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return len(ours) > 0 and all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5) for a, b in pairs)


def dvc_rows(truth: Path, work: Path, seed: int) -> list[Row]:
    """Kills of what DVC runs (`tests/proofs/dvc_kills.py`)."""
    project = dvc_project(truth, make(work / "dvc") / "project")
    draw = random.Random(seed)
    trials = {
        (stage, "SIGKILL during DVC's commit"): partial(killed_in_commit, project, stage, draw) for stage in SAVING
    }
    trials["train_sft", "SIGKILL in dvc exp run --temp"] = partial(killed_in_temp, project)
    trials["train_sft", "SIGKILL of a dvc queue's worker"] = partial(killed_in_queue, project)
    rows = []
    for (stage, method), trial in trials.items():
        started = time.monotonic()
        shutil.rmtree(project / ".scratch", ignore_errors=True)
        try:
            wrong = trial()
        except AssertionError as error:  # what did not come is a failure of this trial, and the others stand
            wrong = [str(error)]
        failures = [f"{stage}, {method}: {text}" for text in wrong]
        rows.append(Row(stage, 1, method, 1, 1, int(not wrong), 0.0, time.monotonic() - started, failures))
        print("  ".join(rows[-1].cells()), flush=True)
    return rows


ONE_RANK = "SIGKILL to one rank"
OTHER_NUMBER = "SIGKILL, then one process, ZeRO 3"
SAVING = STAGES[1:]  # tokenize keeps nothing


def end_group(process: subprocess.Popen) -> None:
    """Make sure nothing of a launch is left, as a machine that goes down does."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    time.sleep(0.2)


def kill_all(number: int) -> Callable[[subprocess.Popen], None]:
    """Hit the whole process group, as a terminal does for Ctrl-C."""
    return lambda process: os.killpg(process.pid, number)


def kill_launcher(number: int) -> Callable[[subprocess.Popen], None]:
    """Hit the process that was started, as a scheduler does."""
    return lambda process: process.send_signal(number)


def kill_one_rank(process: subprocess.Popen) -> None:
    """Kill the last process that the launcher has started; with none yet, the launcher."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]) if children else process.pid, signal.SIGKILL)


def forked_rows(folder: Path, stage: str, kills: int | None, draw: random.Random) -> list[Row]:
    """All methods that fork. `kills`: operations tried by each, None for every one that differs."""
    trials = Trials(folder, stage, draw)
    points, count = kill_points(trials.operations), len(trials.operations)
    rows = [Row(stage, 1, name) for name in ("SIGKILL at each file operation", "SIGKILL, three in a row")]
    rows[0].failures += [f"{stage} undisturbed: {text}" for text in trials.undisturbed]
    for point in points if kills is None else sorted(draw.sample(points, min(kills, len(points)))):
        trials.forked(rows[0], [point], signal.SIGKILL)
    for _ in range(6 if kills is None else 1):
        # Amid the work first, then soon after each start, so that the third still has something before it.
        spans = ((count // 4, count // 2), (1, count // 4), (1, count // 6))
        trials.forked(rows[1], [draw.randint(*span) for span in spans], signal.SIGKILL)
    for number in STOPS if kills is None else (draw.choice(STOPS),):
        row = Row(stage, 1, f"{number.name} at file operations")
        for _ in range(10 if kills is None else 1):
            trials.forked(row, [draw.choice(points)], number)
        rows.append(row)
    return rows


def real_rows(folder: Path, stage: str, processes: int, kills: int, draw: random.Random) -> list[Row]:
    """All methods with real processes, each with `kills` in a row."""
    trials = RealTrials(folder, stage, processes, draw)
    methods: dict[str, Callable[[subprocess.Popen], None]] = {"SIGKILL at random moments": kill_all(signal.SIGKILL)}
    methods["SIGTERM at random moments"] = kill_launcher(signal.SIGTERM)
    methods["SIGINT at random moments"] = kill_all(signal.SIGINT)
    if processes > 1:
        methods[ONE_RANK] = kill_one_rank
    rows = []
    for method, kill in methods.items():
        rows.append(Row(stage, processes, method))
        trials.trial(rows[-1], kills, kill)
    return [*rows, other_processes_row(trials)] if processes > 1 else rows


def tiny_truth(folder: Path) -> Path:
    """A project in which every stage has run undisturbed, each in a child: this process computes nothing."""
    new_project(folder)
    for stage in ALL_STAGES:
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
        change(folder / "params.yaml", {stage: settings})
        without_outs(folder, stage)
        ended = run_forked(folder, stage)
        if ended.status:
            raise RuntimeError(f"{stage} with {settings} fails undisturbed: {ended.output[-3000:]}")
    write_lock(folder, list(STAGES))
    return folder


def main() -> None:
    options = parse()
    end = time.monotonic() + 60 * options.minutes if options.minutes else None
    load_libraries(list(ALL_STAGES))
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
            if processes == 1 or not stage.startswith("tokenize"):  # tokenize is one process, always
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
