"""Throughput of train_grpo with responses drawn a phase ahead, beside the same two processes taking turns.

    python -m benchmarks.asynchronous PROJECT --rounds 3 --table benchmarks/asynchronous.md

PROJECT is a folder in which the pipeline has run up to train_rm; it is only read. Both ways are the stage as it is, the
trainer pinned to processor 0 and the process that samples to processor 1; "in turn" waits for the responses before it
learns. They run one after the other, `--rounds` times. Counted are the phases whose updates and sampling fall together:
all but the first and the last. Seconds by the clock, and of the processor that each process has used.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from stages import train_grpo
from stages.lib.rl.samplers.asynchronous import AsynchronousSampler
from stages.lib.runs.training_run import TrainingRun
from stages.lib.settings.declaration import block
from stages.lib.settings.engine_correction import TokenTruncated
from tests.stages.tiny_pipeline import PROJECT, change, inside

PHASES = 8
WAYS = ("in turn", "ahead")
HEAD = """# Sampling a phase ahead

`python -m benchmarks.asynchronous PROJECT --table …` makes this table again: train_grpo of the default run's models,
{rows} responses in each phase, drawn {batch} at a time, {epochs} pass(es) over them, {phases} phases counted in each of
{rounds} rounds. The trainer and the process that samples are pinned to one processor each. Medians over the phases of
all rounds.

| way | seconds a phase | of the processor: trainer | sampler | responses a second |
|---|---|---|---|---|
"""


class Timed(NamedTuple):
    """Of each counted phase: seconds by the clock, and of the processor in the trainer and in the sampler."""

    wall: list[float]
    trainer: list[float]
    sampler: list[float]


def cpu_seconds_of(process: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def one(project: Path, way: str, epochs: int, batch: int) -> Timed:
    """Run the stage in this process, in a copy of the project."""
    os.sched_setaffinity(0, [0])
    marks: list[tuple[float, float, float]] = []
    samplers: list[AsynchronousSampler] = []
    sample, record = AsynchronousSampler.sample, TrainingRun.record

    def sampled(self: AsynchronousSampler, *asked: Any) -> Any:
        samplers.append(self)
        found = sample(self, *asked)
        if way == "in turn":
            self.finish()
        return found

    def recorded(self: TrainingRun, *row: Any) -> None:
        record(self, *row)
        process: Any = samplers[0].ahead
        used = resource.getrusage(resource.RUSAGE_SELF)
        beside = cpu_seconds_of(process.process.process.pid) if len(marks) < PHASES - 1 else 0.0
        marks.append((time.monotonic(), used.ru_utime + used.ru_stime, beside))

    AsynchronousSampler.sample, TrainingRun.record = sampled, recorded
    with tempfile.TemporaryDirectory(prefix="asynchronous-") as place:
        folder = Path(place)
        for name in ("data", "models"):
            (folder / name).mkdir()
            for child in (project / name).iterdir():
                (folder / name / child.name).symlink_to(child.resolve())
        for name in ("grpo", "rollouts"):
            for old in folder.glob(f"*/{name}"):
                old.unlink()
        (folder / "data/rollouts").mkdir()
        for name in ("params.yaml", "runtime.yaml", "dvc.yaml"):
            shutil.copyfile(PROJECT / name, folder / name)
        chosen = {"asynchronous": True, "engine_correction": block(TokenTruncated), "iterations": PHASES}
        change(folder / "params.yaml", {"train_grpo": {"grpo": chosen | {"epochs": epochs, "held_out": None}}})
        runtime = {
            "threads": 1,
            "checkpoint_seconds": 1e6,
            "generation_batch_size": batch,
            "sampling_process": {"threads": 1, "processors": [1]},
        }
        change(folder / "runtime.yaml", {"default": runtime})
        with inside(folder):
            train_grpo.main(
                validation=Path("data/tokens/validation/prompts.arrow"),
                out=Path("models"),
                rollouts=Path("data/rollouts"),
                metrics=Path("metrics/training"),
                curve=Path("metrics/curves"),
                name="grpo",
            )
    steps = [[after - before for before, after in zip(a, b, strict=True)] for a, b in pairwise(marks)]
    counted = steps[: PHASES - 2]
    return Timed(*([step[place] for step in counted] for place in range(3)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1, help="passes over the responses: until both cost alike")
    parser.add_argument("--batch", type=int, default=24, help="sequences sampled at a time: likewise")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.project.resolve(), options.one, options.epochs, options.batch)))
        return
    found: dict[str, list[Timed]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            words = [sys.executable, "-m", "benchmarks.asynchronous", str(options.project), "--one", way]
            words += ["--epochs", str(options.epochs), "--batch", str(options.batch)]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            found[way].append(Timed(*json.loads(done.stdout.splitlines()[-1])))
            print(way, found[way][-1], flush=True)
    responses, lines = 128, []
    for way in WAYS:
        medians = [statistics.median(value for timed in found[way] for value in timed[place]) for place in range(3)]
        numbers = " | ".join(f"{value:.2f}" for value in medians)
        lines.append(f"| {way} | {numbers} | {responses / medians[0]:.1f} |")
    pairs = zip(*(found[way] for way in WAYS), strict=True)
    ratios = [statistics.median(turn.wall) / statistics.median(ahead.wall) for turn, ahead in pairs]
    lines.append("")
    lines.append(
        f"Ahead is {statistics.median(ratios):.2f} times as fast ({', '.join(f'{ratio:.2f}' for ratio in ratios)})."
    )
    text = HEAD.format(
        rows=responses, epochs=options.epochs, batch=options.batch, phases=PHASES - 2, rounds=options.rounds
    )
    print(text + "\n".join(lines))
    if options.table:
        options.table.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
