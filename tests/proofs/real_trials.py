"""Trials with real processes, one or two under torchrun, which are killed at random moments."""

import contextlib
import json
import math
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from stages.lib.data.token_tables import REFERENCE_SCHEMA, read_table
from tests.proofs.dvc_projects import kill_below
from tests.proofs.forked_trials import end_differs
from tests.proofs.hit_process import operations, place_of
from tests.proofs.kill_table import Row
from tests.proofs.tiny_projects import (
    SAVING,
    found_below,
    half_written,
    listing,
    outs_of,
    remove_outs,
    start_process,
    without_outs,
    write_lock,
)
from tests.proofs.told_ends import RESUMED, SLOWEST_EXIT, STOPS, wrong_words
from tests.stages.tiny_pipeline import change

ONE_RANK = "SIGKILL to one rank"
OTHER_NUMBER = "SIGKILL, then one process, ZeRO 3"
SAVED = re.compile(r"os\.rename .+-#\.(json\.)?partial")  # what ends the writing of a checkpoint or partial result
TRIES = 10  # starts for each kill, at most
FURTHEST = 1e-5  # relative L2 distance of weights that were finished on other processes or in another ZeRO stage
SLOWEST_LOSS_OF_A_RANK = 45.0  # seconds from the death of one rank to the end of all: torchrun waits 30 for the others


class RealTrials:
    """Trials with real processes: `processes` of them, under torchrun if that is more than one."""

    def __init__(self, folder: Path, stage: str, processes: int, draw: random.Random) -> None:
        self.folder, self.stage, self.processes, self.draw = folder, stage, processes, draw
        self.output = folder.parent / f"{folder.name}.output"
        self.seconds = self.make_truth()
        self.truth = listing(folder)
        self.numbers, self.weights = numbers_of(folder, stage), weights_of(folder, stage)

    def make_truth(self) -> float:
        """Run undisturbed: on two processes sums are rounded otherwise than on one."""
        without_outs(self.folder, self.stage)
        started = time.monotonic()
        status, output = self.finish()
        if status != 0:
            raise RuntimeError(f"{self.stage} on {self.processes} processes fails undisturbed: {output[-3000:]}")
        write_lock(self.folder)
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
        self.longest_wait = 0.3 if self.processes == 1 else 1.0
        for _ in range(TRIES * kills):
            remove_outs(self.folder, self.stage)
            self.output.unlink(missing_ok=True)
            process = start_process(self.folder, self.stage, self.processes, self.output)
            took = self.hit(process, kill)
            if took is None:
                self.begin_anew()
                hit_before = False
                continue
            row.kills += 1
            kills -= 1
            row.slowest_exit = max(row.slowest_exit, took)
            output = self.output.read_text()
            row.resumed += hit_before and any(word in output for word in RESUMED)
            hit_before = True
            wrong += self.wrong_end(row.method, process.returncode, output, took)
            kill_below(self.folder)  # torchrun starts its processes in groups of their own
            wrong += half_written(self.folder, self.stage, self.truth)
            if not kills:
                break
        remove_outs(self.folder, self.stage)
        status, output = self.finish()
        row.resumed += any(word in output for word in RESUMED)
        wrong += [f"ended with status {status}: {output[-2000:]}"] if status else []
        wrong += end_differs(self.folder, self.stage, self.truth)
        wrong += [f"it was over before it could be killed, {kills} times too often"] if kills else []
        wrong += [] if row.resumed or self.processes == 1 else ["nothing that was saved was used"]
        row.failures += [f"{row.stage}, {self.processes} processes, {row.method}: {text}" for text in wrong]
        row.seconds += time.monotonic() - started

    def hit(self, process: subprocess.Popen, kill: Callable[[subprocess.Popen], None]) -> float | None:
        """`kill` at a random moment. Returns the seconds until all was over, None if it was over before.

        Ranks are over half a second before their launcher, and a rank that is over cannot be killed.
        """
        if not self.moment_came(process):
            return None
        asked = time.monotonic()
        kill(process)
        process.wait()
        return time.monotonic() - asked if process.returncode else None

    def begin_anew(self) -> None:
        """The run was over before the signal: from the beginning, and sooner.

        On a fast machine a tiny stage is over 0.05 s after its first saves: a fixed time to wait would mostly be too
        long, and one that is halved each time is soon short enough anywhere.
        """
        kill_below(self.folder)
        without_outs(self.folder, self.stage)
        self.seconds *= 0.7
        self.longest_wait *= 0.5

    def at_chosen_operations(self, row: Row) -> None:
        """Take all processes down at chosen operations of the first one, which alone writes.

        First in the middle of a save, and the start after that before the last rename, which for most stages is between
        those of two outs. Then a fresh run after the last one. Each time it is let finish and compared.
        """
        started = time.monotonic()
        log = self.output.with_suffix(".operations")
        without_outs(self.folder, self.stage)
        self.start_through(log, "never")
        names = operations(log)
        renames = [place for place, name in enumerate(names) if name.startswith("os.rename")]
        saves = [place for place in renames if SAVED.match(names[place])]
        in_save = saves[len(saves) // 2] - self.draw.randint(0, 2)
        wrong = []
        for places in ((place_of(names, in_save), place_of(names, renames[-1])), ("end",)):
            row.trials += 1
            without_outs(self.folder, self.stage)
            for place in places:
                remove_outs(self.folder, self.stage)
                status, output = self.start_through(log, place)
                row.kills += 1
                row.resumed += any(word in output for word in RESUMED)
                wrong += [] if status == -signal.SIGKILL else [f"not killed at {place}, but ended with {status}"]
                wrong += half_written(self.folder, self.stage, self.truth)
            remove_outs(self.folder, self.stage)
            status, output = self.finish()
            row.resumed += "already finished" in output
            wrong += [f"ended with status {status}: {output[-2000:]}"] if status else []
            wrong += end_differs(self.folder, self.stage, self.truth)
        wrong += [] if row.resumed == row.kills else [f"{row.resumed} starts went on from what was saved"]
        row.failures += [f"{row.stage}, {self.processes} processes, {row.method}: {text}" for text in wrong]
        row.seconds += time.monotonic() - started

    def start_through(self, log: Path, place: str) -> tuple[int, str]:
        self.output.unlink(missing_ok=True)
        through = ("tests.proofs.hit_process", str(log), place)
        status = start_process(self.folder, self.stage, self.processes, self.output, *through).wait()
        return status, self.output.read_text()

    def moment_came(self, process: subprocess.Popen) -> bool:
        """Wait for a random moment, mostly soon after the first saves; False if the process ended before.

        Of a start on one process a quarter is hit at any time, libraries being loaded or not. Two need seconds to meet,
        in which there is nothing to lose.
        """
        share = self.draw.random()
        if self.stage in SAVING and (self.processes > 1 or self.draw.random() < 0.75):
            while process.poll() is None and not saved_something(self.folder):
                time.sleep(0.005)
            time.sleep(self.longest_wait * share)
            return process.poll() is None
        wait = self.seconds * share
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            return True
        return False

    def wrong_end(self, method: str, status: int, output: str, seconds: float) -> list[str]:
        number = next((number for number in STOPS if number.name in method), None)
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
        told = output.count("stopped by SIG")
        # torchrun says that it was stopped also where its processes have just ended well, with nothing to tell.
        over = told == 0 and all((self.folder / path).exists() for path in outs_of(self.stage))
        return found + ([] if told == 1 or over else [f"told {told} times: {output[-2000:]}"])


def not_begun(output: str) -> bool:
    return "KeyboardInterrupt" in output and "stages/lib" not in output


def other_processes_row(trials: RealTrials) -> Row:
    """Two processes are killed, and one finishes, under ZeRO 3: the files are those of two but for rounding."""
    row = Row(trials.stage, 2, OTHER_NUMBER, trials=1)
    started = time.monotonic()
    row.kills += killed_on_two(trials)
    status, output = finished_on_one(trials)
    row.resumed = int("resuming" in output)
    if status or not row.resumed:
        row.failures.append(f"{trials.stage}: one process does not go on from the state of two: {output[-2000:]}")
    else:
        row.failures += [f"{trials.stage}, {OTHER_NUMBER}: {text}" for text in further_than_rounding(trials)]
    row.seconds = time.monotonic() - started
    return row


def killed_on_two(trials: RealTrials) -> bool:
    """Start two processes and kill them once something is saved. Returns whether they were not over by then."""
    folder, stage = trials.folder, trials.stage
    without_outs(folder, stage)
    trials.output.unlink(missing_ok=True)
    process = start_process(folder, stage, 2, trials.output)
    while process.poll() is None and not saved_something(folder):
        time.sleep(0.005)
    alive = process.poll() is None
    kill_below(folder)
    process.wait()
    return alive


def finished_on_one(trials: RealTrials) -> tuple[int, str]:
    """Let one process finish under ZeRO 3. Returns its status and output."""
    settings = trials.folder / "runtime.yaml"
    before = settings.read_text()
    remove_outs(trials.folder, trials.stage)
    trials.output.unlink()
    change(settings, {"default": {"zero_stage": 3, "frozen_zero_stage": 3}})
    status = start_process(trials.folder, trials.stage, 1, trials.output).wait()
    settings.write_text(before)
    return status, trials.output.read_text()


def further_than_rounding(trials: RealTrials) -> list[str]:
    """In which files, numbers and weights a project is not that of the undisturbed run, up to rounding; in words."""
    names = sorted(listing(trials.folder).keys() ^ trials.truth.keys())
    if names:
        return [f"these files are missing or too much: {', '.join(names)}"]
    found = [] if close(numbers_of(trials.folder, trials.stage), trials.numbers) else ["other numbers or rollouts"]
    for out, ours in weights_of(trials.folder, trials.stage).items():
        apart = distance(ours, trials.weights[out])
        if not apart <= FURTHEST:  # nan is too far as well
            found.append(f"the weights of {out} are {apart:.1e} from those of the undisturbed run, over {FURTHEST:.0e}")
    return found


def saved_something(folder: Path) -> bool:
    """Whether two checkpoints or partial results are there."""
    patterns = (".scratch/*/code-*/checkpoint-????????", ".scratch/*/kept/*.json")
    return sum(len(found_below(folder, pattern)) for pattern in patterns) > 1


def numbers_of(folder: Path, stage: str) -> list[float]:
    """Every number in the metrics of a stage, in the table that it writes, and the tokens of its rollouts."""
    found: list[float] = []
    for path in (folder / out for out in outs_of(stage)):
        if path.suffix == ".json":
            found += json.loads(path.read_text()).values()
        elif path.parent.name == "ref_logprobs":
            table = read_table(path / "train.arrow", REFERENCE_SCHEMA)
            found += table["reference_chosen_logps"][:] + table["reference_rejected_logps"][:]
        elif path.parent.name == "rollouts":
            for ids in pq.read_table(path / "rollouts.parquet")["response_ids"].to_pylist():
                found += ids
    return found


def close(ours: list[float], theirs: list[float]) -> bool:
    if not ours or len(ours) != len(theirs):  # a rollout may have ended sooner
        return False
    return all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5) for a, b in zip(ours, theirs, strict=True))


def weights_of(folder: Path, stage: str) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of every model that a stage writes, by out.

    In numpy: this process forks stages, and a process that torch has computed in cannot be forked safely.
    """
    files = {out: folder / out / "model.safetensors" for out in outs_of(stage)}
    return {out: load_file(file) for out, file in files.items() if file.exists()}


def distance(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Relative L2 distance of all tensors together; infinite if they are not the same ones."""
    if {name: tensor.shape for name, tensor in ours.items()} != {name: each.shape for name, each in theirs.items()}:
        return math.inf
    return math.sqrt(
        sum(squares(ours[name].astype(np.float64) - tensor) for name, tensor in theirs.items())
        / sum(squares(tensor.astype(np.float64)) for tensor in theirs.values())
    )


def squares(tensor: np.ndarray) -> float:
    return float(np.square(tensor).sum())


def kill_all(number: int) -> Callable[[subprocess.Popen], None]:
    """Hit the whole process group, as a terminal does for Ctrl-C."""
    return lambda process: os.killpg(process.pid, number)


def kill_launcher(number: int) -> Callable[[subprocess.Popen], None]:
    """Hit the process that was started, as a scheduler does."""
    return lambda process: process.send_signal(number)


def kill_one_rank(draw: random.Random) -> Callable[[subprocess.Popen], None]:
    """Kill one of the processes that the launcher has started, if they are not just over."""

    def kill(process: subprocess.Popen) -> None:
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(draw.choice(ranks)), signal.SIGKILL)

    return kill


def real_rows(folder: Path, stage: str, processes: int, kills: int, draw: random.Random) -> list[Row]:
    """All methods with real processes, each with `kills` in a row."""
    trials = RealTrials(folder, stage, processes, draw)
    methods: dict[str, Callable[[subprocess.Popen], None]] = {
        "SIGKILL at random moments": lambda _process: kill_below(folder)
    }
    methods["SIGTERM at random moments"] = kill_launcher(signal.SIGTERM)
    methods["SIGINT at random moments"] = kill_all(signal.SIGINT)
    if processes > 1:
        methods[ONE_RANK] = kill_one_rank(draw)
    rows = []
    for method, kill in methods.items():
        rows.append(Row(stage, processes, method))
        trials.trial(rows[-1], kills, kill)
    if processes == 1:
        return rows
    rows.append(Row(stage, processes, "SIGKILL in a save, at the last rename, at the end"))
    trials.at_chosen_operations(rows[-1])
    return [*rows, other_processes_row(trials)]
