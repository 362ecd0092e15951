"""Training steps beside TRL's trainers: the same model, rows, order, batch and threads, in one alternating run.

    python -m benchmarks.against_trl --trl TRL_PYTHON --data hh=…/test.jsonl.gz --data dpo_en_demo=…/dpo_en_demo.json

TRL runs in an environment of its own, made from `benchmarks/requirements-trl.txt`; `make bench` makes it. Each job runs
in a fresh process for each of the two, one after the other, `--rounds` times; a round that was disturbed tells by its
spread. What is compared is the median over all timed steps.

- rows/s: rows, or pairs, of a step by its time. Of the reference: pairs by the time for all of them.
- memory: peak of the process, libraries included.
- share of the peak: FLOPs that the mathematics asks for (`model_flops`; a pair's prompt counted once, for both
  programs), by the time and the rate of a large product of matrices on as many threads.
- losses: the largest difference of a step's loss between the two, relative to the largest loss.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks.model_flops import forward_flops, training_flops
from benchmarks.trl_jobs import JOBS, LLAMA, Job, Order, encoded, texts_of, write_models
from stages.lib.command.errors import StageError
from stages.lib.command.run import run

AGREE = 1e-3  # of losses of a few steps in fp32, relative: beyond it the two do not compute the same
REFERENCE_PAIRS = 128


class Result(NamedTuple):
    """Of one job on one data set: what each program's processes found."""

    data: str
    job: Job
    pairs: list[dict[str, list[int]]]
    ours: list[dict[str, Any]]
    trl: list[dict[str, Any]]


def main(
    trl: Annotated[Path, typer.Option(help="Python of the environment with TRL")],
    data: Annotated[list[str], typer.Option(help="NAME=PATH of pairs in any format that is read; may be repeated")],
    out: Annotated[Path, typer.Option(help="Markdown file to write")] = Path("benchmarks/against_trl.md"),
    only: Annotated[list[str] | None, typer.Option(help="names of jobs, such as dpo-8; may be repeated")] = None,
    rounds: Annotated[int, typer.Option(help="times that each job runs")] = 3,
    steps: Annotated[int, typer.Option(help="timed steps of a process, at 8 rows; fewer at more")] = 8,
    threads: Annotated[int, typer.Option(help="of each process")] = 2,
    longest: Annotated[int, typer.Option(help="tokens of a sequence; pairs with longer ones are left out")] = 512,
) -> None:
    """Time training steps beside TRL's."""
    jobs = chosen(only)
    named = dict(one.split("=", 1) if "=" in one else (Path(one).stem, one) for one in data)
    results = []
    with tempfile.TemporaryDirectory(prefix="against-trl-") as place:
        folder = Path(place)
        write_models(folder)
        for name, path in named.items():
            pairs = list(encoded(texts_of(Path(path)), longest))
            for job in jobs:
                results.append(timed(job, name, pairs, folder, trl, rounds=rounds, steps=steps, threads=threads))
                print(line_of(results[-1]), flush=True)
                out.write_text(table(results, threads, longest, rounds), encoding="utf-8")
    print(f"Wrote {out}")
    apart = [f"{one.job.name} on {one.data}" for one in results if not difference(one) <= AGREE]
    if apart:
        raise StageError(f"the losses of {', '.join(apart)} differ by more than {AGREE}: nothing is compared so")


def chosen(names: list[str] | None) -> list[Job]:
    known = {job.name: job for job in JOBS}
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise StageError(f"--only {unknown[0]} is not one of: {', '.join(known)}")
    return [job for name, job in known.items() if not names or name in names]


def timed(
    job: Job,
    data: str,
    pairs: list[dict[str, list[int]]],
    folder: Path,
    trl: Path,
    *,
    rounds: int,
    steps: int,
    threads: int,
) -> Result:
    """Run a job with both programs in turn."""
    warm_up, many = 2, max(2, steps * 8 // job.rows)
    count = REFERENCE_PAIRS if job.task == "reference" else (warm_up + many) * job.rows
    if len(pairs) < job.rows:
        raise StageError(f"{data}: {job.name} needs {job.rows} pairs within the length, and there are {len(pairs)}")
    rows = list(islice(cycle(pairs), count))  # of few pairs the first come again
    written, out = folder / "pairs.jsonl", folder / "out.json"
    written.write_text("".join(json.dumps(pair) + "\n" for pair in rows), encoding="utf-8")
    order = Order(job.task, job.rows, warm_up, many, threads, 1e-4, 0.1, str(folder), str(written), str(out))
    order.write(folder / "order.json")
    script = Path(__file__).with_name("trl_steps.py")
    result = Result(data, job, rows, [], [])
    for _ in range(rounds):
        for found, command in (
            (result.trl, [trl, script]),
            (result.ours, [sys.executable, "-m", "benchmarks.our_steps"]),
        ):
            found.append(process([*map(str, command), str(folder / "order.json")], out, threads))
    return result


def process(command: list[str], out: Path, threads: int) -> dict[str, Any]:
    out.unlink(missing_ok=True)
    settings = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    if not out.exists():
        raise StageError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(out.read_text(encoding="utf-8"))


def seconds_of(found: list[dict[str, Any]], clock: str) -> float:
    """The median of a step, by the clock on the wall (`seconds`) or the time of processors."""
    return statistics.median(value for one in found for value in one[clock])


def difference(result: Result) -> float:
    """The largest difference of a loss, or of a log-prob, relative to the largest."""
    ours, theirs = result.ours[0]["losses"], result.trl[0]["losses"]
    return max(abs(one - other) for one, other in zip(ours, theirs, strict=True)) / max(map(abs, theirs))


def flops_of_a_step(result: Result) -> float:
    """Mean FLOPs of a timed step, a pair's prompt counted once."""
    job, total = result.job, 0
    timed_pairs = result.pairs if job.task == "reference" else result.pairs[2 * job.rows :]
    for pair in timed_pairs:
        prompt, chosen, rejected = (len(pair[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
        if job.task == "sft":
            total += training_flops(LLAMA, [prompt + chosen], chosen)
            continue
        # As one sequence: attention between the two replies is counted too, a few parts in a hundred.
        lengths, logits = [prompt + chosen + rejected], 0 if job.task == "rm" else chosen + rejected
        total += 0 if job.task == "reference" else training_flops(LLAMA, lengths, logits)
        total += forward_flops(LLAMA, lengths, logits) if job.task in ("dpo-live", "reference") else 0
    return total if job.task == "reference" else total * job.rows / len(timed_pairs)


HEADER = (
    "| data | task | rows | TRL rows/s | ours rows/s | times | processor time, times | TRL MiB | ours MiB |"
    " TRL share of peak | ours | losses differ by |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def line_of(result: Result) -> str:
    ours, theirs = (seconds_of(found, "seconds") for found in (result.ours, result.trl))
    own, other = (seconds_of(found, "processor_seconds") for found in (result.ours, result.trl))
    rows = len(result.pairs) if result.job.task == "reference" else result.job.rows
    peak = max(one["matrix_flops"] for one in result.ours)
    flops = flops_of_a_step(result)
    memory = [max(one["peak_bytes"] for one in found) / 2**20 for found in (result.trl, result.ours)]
    cells = [result.data, result.job.task, str(result.job.rows), f"{rows / theirs:.1f}", f"{rows / ours:.1f}"]
    cells += [f"{theirs / ours:.2f}", f"{other / own:.2f}", *(f"{size:,.0f}" for size in memory)]
    cells += [f"{flops / theirs / peak:.0%}", f"{flops / ours / peak:.0%}", f"{difference(result):.0e}"]
    return f"| {' | '.join(cells)} |"


def curves(result: Result) -> str:
    """Both loss curves, step by step."""
    if result.job.task == "reference":
        return ""
    lines = [
        f"{name}: " + " ".join(f"{loss:.4f}" for loss in found[0]["losses"])
        for name, found in (("TRL ", result.trl), ("ours", result.ours))
    ]
    return f"{result.data}, {result.job.name}\n" + "\n".join(lines) + "\n"


def table(results: list[Result], threads: int, longest: int, rounds: int) -> str:
    import torch

    peak = max(one["matrix_flops"] for result in results for one in result.ours)
    return (
        "# Training steps beside TRL 1.16\n\n"
        f"`make bench` writes this table; {datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}, transformers "
        f"{version('transformers')}, {threads} threads, {rounds} rounds. A Llama of 3.93 million random weights, "
        f"fp32, pairs of at most {longest} tokens, the same rows in the same order. The peak is "
        f"{peak / 1e9:.0f} GFLOP/s, of a product of matrices. `benchmarks/against_trl.py` says what is counted.\n\n"
        + HEADER
        + "\n"
        + "\n".join(map(line_of, results))
        + "\n\n## Losses of the first process of each\n\n```\n"
        + "\n".join(filter(None, map(curves, results)))
        + "```\n"
    )


if __name__ == "__main__":
    run(main)
