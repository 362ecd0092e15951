"""Training throughput: tokens per second, peak memory and model FLOPs utilisation of SFT, RM, DPO and a PPO phase.

    python -m benchmarks.train_throughput                              # Qwen2.5-1.5B's architecture, for a GPU
    python -m benchmarks.train_throughput --size tiny                  # proof on a CPU that all of it runs
    python -m benchmarks.train_throughput --only sft --only 'dpo*'     # some configurations; --list names them all

The weights are random and so are the tokens, so nothing is downloaded. What is timed is the stages' own code: their
losses, engines, batching and, for PPO, sampling. Each configuration runs in a process of its own, so a peak of memory
is its own, and one that runs out of memory is a row of the table, not the end. OUT/results.json and OUT/table.md are
rewritten after each.

- tokens/s: tokens of whole sequences (prompts included, padding not) that a step handles, by the time of all timed
  steps. Of PPO: tokens of the rollouts, each counted once, by the time to sample, judge and learn from them.
- peak memory: on a GPU what torch's tensors took at most, on a CPU the process, libraries included.
- MFU: model FLOPs per second over the GPU's peak; `benchmarks/model_flops.py` says what is counted.
"""

from __future__ import annotations

import fnmatch
import json
import tempfile
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.fresh_processes import run_module
from benchmarks.workloads import ARCHITECTURES, PPO_STEPS, WORKLOADS, Configuration, Workload, all_configurations
from stages.lib.command.errors import StageError
from stages.lib.command.run import run

SHORTEST_RUN = 20.0  # seconds below which no further configuration is started


def main(
    size: Annotated[str, typer.Option(help=f"of the model: {', '.join(ARCHITECTURES)}")] = "qwen2.5-1.5b",
    only: Annotated[list[str] | None, typer.Option(help="name or pattern of configurations; may be repeated")] = None,
    out: Annotated[Path, typer.Option(help="folder for results.json, table.md and the log")] = Path("plots/throughput"),
    minutes: Annotated[float, typer.Option(help="no configuration runs beyond so many minutes in all")] = 9.0,
    micro_batch_tokens: Annotated[int | None, typer.Option(help="tokens of one forward pass")] = None,
    sequences: Annotated[int | None, typer.Option(help="sequences of an optimizer step; a pair is two")] = None,
    precision: Annotated[str, typer.Option(help="bf16 or fp32")] = "bf16",
    list_only: Annotated[bool, typer.Option("--list", help="print the names of the configurations and end")] = False,
) -> None:
    """Time the training stages on random weights and tokens."""
    chosen = choose(only or ["*"])
    if list_only:
        print("\n".join(configuration.name for configuration in chosen))
        return
    workload = workload_of(size, precision, micro_batch_tokens, sequences)
    deadline = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"workload": asdict(workload), "results": {}}
    log = out / "log.txt"
    log.write_text("")
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        models = Path(folder)
        ended = run_module("benchmarks.random_models", [size, precision, folder], log, deadline)
        if ended != 0:
            raise StageError(f"the models with random weights could not be made: {describe(ended)}; see {log}")
        for configuration in chosen:
            result = run_one(workload, configuration, models, log, deadline)
            report["results"][configuration.name] = {"configuration": asdict(configuration), **result}
            write(out, report, workload)
            print("\n".join(lines_of(configuration, result)), flush=True)
    print(f"Wrote {out}/table.md and {out}/results.json")


def choose(patterns: list[str]) -> list[Configuration]:
    """The configurations that a pattern fits. Raises StageError for a pattern that fits none."""
    known = all_configurations()
    for pattern in patterns:
        if not fnmatch.filter([configuration.name for configuration in known], pattern):
            raise StageError(f"--only {pattern}: no configuration is so named; --list shows them")
    return [one for one in known if any(fnmatch.fnmatch(one.name, pattern) for pattern in patterns)]


def workload_of(size: str, precision: str, micro_batch_tokens: int | None, sequences: int | None) -> Workload:
    """The workload of a size, with what the command line changes. Raises StageError for a value that makes none."""
    if size not in WORKLOADS:
        raise StageError(f"--size {size} is not one of: {', '.join(WORKLOADS)}")
    if precision not in ("bf16", "fp32"):
        raise StageError(f"--precision {precision} is not one of: bf16, fp32")
    workload = replace(WORKLOADS[size], precision=precision)
    if micro_batch_tokens is not None:
        if micro_batch_tokens < 1:
            raise StageError(f"--micro-batch-tokens must be at least 1, found {micro_batch_tokens}")
        workload = replace(workload, micro_batch_tokens=micro_batch_tokens)
    if sequences is not None:
        if sequences < 2 or sequences % 2:
            raise StageError(f"--sequences must be even and at least 2 (a pair is two), found {sequences}")
        workload = replace(workload, sequences=sequences)
    return workload


def run_one(
    workload: Workload, configuration: Configuration, models: Path, log: Path, deadline: float
) -> dict[str, Any]:
    """Measure one configuration in a process of its own. Returns what it found, at least a `status`."""
    if configuration.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        return {"status": "not run: flash-attn is not installed"}
    if deadline - time.monotonic() < SHORTEST_RUN:
        return {"status": "not run: time is up"}
    if configuration.stage == "ppo":
        workload = replace(workload, **PPO_STEPS)
    result = models / "result.json"
    result.unlink(missing_ok=True)
    asked = [json.dumps(asdict(workload)), json.dumps(asdict(configuration)), str(models), str(result)]
    with log.open("a") as file:
        file.write(f"== {configuration.name}\n")
    ended = run_module("benchmarks.timed_steps", asked, log, deadline)
    if result.exists():
        return json.loads(result.read_text(encoding="utf-8"))
    return {"status": f"failed: {describe(ended)}"}


def describe(exit_code: int | None) -> str:
    """Why a process that left no result ended."""
    if exit_code is None:
        return "stopped, time was up"
    if exit_code < 0:
        return f"killed by signal {-exit_code}, perhaps for want of memory"
    return f"exit code {exit_code}, see the log"


HEADER = (
    "| stage | trained | checkpointing | batches | attention | tokens/s | s | peak GiB | MFU |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def lines_of(configuration: Configuration, result: dict[str, Any]) -> list[str]:
    """A configuration's lines of the table: one for the step, and one for each part where it has several."""
    batches = "packed" if configuration.packing else "padded"
    batches += ", mixed lengths" if configuration.mixed_lengths else ""
    batches += ", activations offloaded" if configuration.offload else ""
    columns = [
        "LoRA" if configuration.lora else "all weights",
        "on" if configuration.checkpointing else "off",
        batches,
        configuration.attention,
    ]
    if "parts" not in result:
        return [f"| {configuration.stage} | {' | '.join(columns)} | {result['status']} | | | |"]
    lines = []
    for part, found in result["parts"].items():
        stage = configuration.stage if part == "step" else f"{configuration.stage}: {part}"
        seconds = sum(found["step_seconds"]) / len(found["step_seconds"])
        memory = f"{result['peak_memory_bytes'] / 2**30:.1f}" if part == "step" else ""
        mfu = "unknown" if found["mfu"] is None else f"{found['mfu']:.1%}"
        numbers = [f"{found['tokens_per_second']:,.0f}", f"{seconds:.3g}", memory, mfu]
        lines.append(f"| {' | '.join([stage, *columns, *numbers])} |")
    return lines


def write(out: Path, report: dict[str, Any], workload: Workload) -> None:
    """Write what is known so far; a reader never sees half a file."""
    results = report["results"]
    machine = next((result["machine"] for result in results.values() if "machine" in result), None)
    report["machine"] = machine
    rows = [line for one in results.values() for line in lines_of(Configuration(**one["configuration"]), one)]
    text = f"{title(workload, machine)}\n\n{HEADER}\n" + "\n".join(rows) + "\n"
    for name, content in (("results.json", json.dumps(report, indent=1) + "\n"), ("table.md", text)):
        part = out / f".{name}.partial"
        part.write_text(content, encoding="utf-8")
        part.replace(out / name)


def title(workload: Workload, machine: dict[str, Any] | None) -> str:
    """What was measured where, in a sentence."""
    where = "No machine measured anything" if machine is None else f"{machine['device']}, torch {machine['torch']}"
    return (
        f"{where}: architecture {workload.size}, random weights, {workload.precision}, sequences of "
        f"{workload.sequence_length} tokens, {workload.sequences} in a step, {workload.micro_batch_tokens} tokens in a "
        f"micro-batch; {workload.new_tokens} tokens of a PPO rollout are sampled."
    )


if __name__ == "__main__":
    run(main)
