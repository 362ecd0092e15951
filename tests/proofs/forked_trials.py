"""Trials that fork a stage from a process with all libraries loaded, and kill it before chosen file operations."""

import random
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from stages.lib.command.hashing import dvc_hash
from stages.lib.operations.run_log import FILE_NAME, read_runs, run_that_made
from tests.proofs.forked_stage import kill_points, prune_forked, run_forked
from tests.proofs.kill_table import Row
from tests.proofs.tiny_projects import differences, half_written, listing, outs_of, remove_outs, without_outs
from tests.proofs.told_ends import RESUMED, STOPS, wrong_words


def end_differs(folder: Path, stage: str, truth: dict[str, str]) -> list[str]:
    """What is otherwise than after an undisturbed run: files, the log of runs, what `prune_scratch` leaves."""
    found = differences(listing(folder), truth)
    hashes = {path: dvc_hash(folder / path) for path in outs_of(stage) if (folder / path).exists()}
    scratch = folder / ".scratch"
    if run_that_made(hashes, read_runs(scratch)) is None:
        found.append("no run is logged that made these outs")
    pruned = prune_forked(folder)
    left = [path.name for path in scratch.glob("*") if path.name != FILE_NAME]
    if pruned.status or left:
        found.append(f"after prune_scratch {left} is left {pruned.output}")
    return found


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
        return end_differs(self.folder, self.stage, self.truth)

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
            wrong += half_written(self.folder, self.stage, self.truth)
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
