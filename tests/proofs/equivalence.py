"""Speed is not a result: every stage under every way to run it, compared with one process, plain torch and padding.

The run that all are compared with shares no prompts; the others do where the default of `pass_cost` gains by it.

Each training stage, with and without LoRA, and those that train on tables with a mixture of experts too, takes 20
optimizer steps from the same weights. Measured are relative L2 distances of the first step's gradient, of the weights'
change in it, of the weights after all steps and of the published ones, and the largest difference of a loss or gradient
norm on the way and of a metric at the end. PPO's rollouts are compared token for token, and those that differ are
counted.

    python -m tests.proofs.equivalence PROJECT                             # makes PROJECT first if it is not there
    torchrun --standalone --nproc_per_node=2 -m tests.proofs.equivalence PROJECT --table table.md
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from stages.lib.command.process_end import end_process
from stages.lib.compute.processes import join_processes
from stages.lib.data.token_tables import REFERENCE_SCHEMA, read_table
from stages.lib.settings.runtime import read_runtime
from tests.proofs.measured_commit import measured_commit
from tests.proofs.watched_stage import (
    ROLLOUTS,
    STEPS,
    TRAINING,
    VARIANTS,
    Probe,
    in_float64,
    make_bf16_project,
    make_project,
    run_stage,
    stage_of,
)
from tests.stages.tiny_pipeline import ENTRIES, inside

# AdamW's first step is g / (|g| + 1e-8): where a gradient is no larger than its own rounding error, the sign is chance.
STEEP = 1e-5
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2, "fp64": 1e-10}
# Of what training changes, a small part of the weights. A run that does not train at all is 1 away.
CHANGE_TOLERANCES = {"fp32": 1e-3, "bf16": 0.1, "fp64": 1e-7}
CHANGE = "their change"
SAMPLING = ("train_ppo", "train_grpo", "evaluate@dpo")
MEASURING = ("ref_logprobs", "evaluate@dpo")  # no optimizer: their outs are compared
# Without it ZeRO 3 would not shard weights as small as these.
SHARD_ALL = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
ZERO_3 = {"zero_stage": 3, "frozen_zero_stage": 3, **SHARD_ALL}
PLAIN = {"engine": "torch", "share_prompts": False}
# A step of eight rows then takes several passes, and every pair shares its prompt.
DEAR_PADDING = {device: {"overhead": 3, "attention": 10**6} for device in ("cpu", "gpu")}
ACTIVATIONS = {"activation_offload": True}
ONE_PROCESS = {
    "micro-batch 1": {"micro_batch_tokens": 1},
    "packing": {"packing": True, "micro_batch_tokens": 300},
    "passes by cost": {"pass_cost": DEAR_PADDING, "share_prompts": False},
    "prompts shared": {"pass_cost": DEAR_PADDING},
    "prompts shared, packing": {"pass_cost": DEAR_PADDING, "packing": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "eager attention": {"attention": "eager"},
    "logits in chunks of 7": {"logits_chunk_tokens": 7},
    "activations offloaded": ACTIVATIONS,
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2, optimizer offloaded": {"zero_stage": 2, "offload_optimizer": True},
    "ZeRO 3": ZERO_3,
}
SEVERAL_PROCESSES = {
    "plain torch": {"engine": "torch"},
    "ZeRO 0": {"zero_stage": 0, "engine": "deepspeed"},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": ZERO_3,
    "ZeRO 3, all offloaded, logits in chunks": {
        **ZERO_3,
        "offload_optimizer": True,
        "offload_parameters": True,
        "frozen_offload_parameters": True,
        "logits_chunk_tokens": 7,  # the processes have different numbers of tokens
    },
    "ZeRO 2, packing, checkpointing": {
        "zero_stage": 2,
        "packing": True,
        "micro_batch_tokens": 200,
        "gradient_checkpointing": True,
    },
    "ZeRO 3, offloaded, packing, checkpointing": {
        **ZERO_3,
        "offload_optimizer": True,
        "offload_parameters": True,
        "frozen_offload_parameters": True,
        "logits_chunk_tokens": 7,
        "packing": True,
        "micro_batch_tokens": 200,
        "gradient_checkpointing": True,
    },
    "ZeRO 2, prompts shared": {"zero_stage": 2, "pass_cost": DEAR_PADDING},
    "plain torch, micro-batch 1": {"engine": "torch", "micro_batch_tokens": 1, "generation_batch_size": 1},
}


HEAD = """# Every way to run a stage, against one process, plain torch and padding

Relative L2 distances, each measured at the commit in its row; `make prove` regenerates this table. The baseline run
shares no prompts. The other runs share them where `pass_cost` says it pays, and those with "prompts shared" in their
name share every pair's or group's.

"Gradient" is what AdamW saw in its first step, before clipping. "Steep" leaves out the weights whose gradient is below
1e-5 but not 0 (their share is "flat weights"): AdamW's first step is g / (|g| + 1e-8), which magnifies the rounding
errors of the smallest g. "Their change" compares what training has made of the weights, last less first; a run that
does not train is 1 away. "Published" is the model that is saved, here an average of the weights over the steps
(`ema_decay`); "losses" are those of all steps and the norms of their gradients; "numbers" are the stage's metrics or,
of ref_logprobs, its outs.

Held to: {limits}; losses of a mixture of experts to five times that, since rounding may choose another expert.
In fp32 and fp64 no rollout may differ. In bf16, where a gradient is rounded by a hundredth, AdamW's first step is
chance for many weights, and so are some tokens that are drawn: the first update is shown but not held, and a run that
drew other rollouts goes on with those of the run that it is compared with.

"""


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((one - other).norm() / other.norm().clamp(min=1e-300))


def compare(probe: Probe, folder: Path, reference: Path, kind: str) -> dict[str, float]:
    """Distances of a run from the reference run saved in `reference`."""
    stage = stage_of(kind)
    drawn = {"differing rollouts": probe.differing_rollouts} if stage in SAMPLING else {}
    if stage in MEASURING:
        return {"numbers": numbers_apart(folder, reference, stage)} | drawn
    found, wanted = probe.found, load_file(reference / "probe.safetensors")
    result: dict[str, float] = {}
    for name in sorted({name.split("/")[0] for name in wanted}):
        before, first, last = (f"{name}/weights {steps}" for steps in (0, 1, STEPS))
        pairs = {
            "first update": tuple(side[first] - side[before] for side in (found, wanted)),
            CHANGE: tuple(side[last] - side[before] for side in (found, wanted)),
            f"weights after {STEPS} steps": (found[last], wanted[last]),
            "gradient": (found[f"{name}/gradient"], wanted[f"{name}/gradient"]),
        }
        gradient = wanted[f"{name}/gradient"]
        steep = (gradient.abs() > STEEP) | (gradient == 0)
        pairs["first update, steep"] = tuple(update[steep] for update in pairs["first update"])
        result["flat weights"] = max(result.get("flat weights", 0.0), float((~steep).double().mean()))
        for key, (one, other) in pairs.items():
            result[key] = max(result.get(key, 0.0), distance(one, other))
    name = ENTRIES[stage]
    curve = f"metrics/curves/{name}.csv"
    ours, theirs = (pd.read_csv(side / curve) for side in (folder, reference))
    columns = [name for name in theirs.columns if name.rpartition("/")[2] in ("loss", "router_loss", "grad_norm")]
    columns = [name for name in columns if not name.startswith("validation")]
    scale = theirs[columns].abs().max()
    if "policy/loss" in columns:
        scale["policy/loss"] = 1.0  # a mean of advantages of size 1, which cancel almost to nothing
    result["losses"] = largest(((ours[columns] - theirs[columns]).abs() / scale).to_numpy().ravel())
    published = (load_file(side / f"models/{name}/model.safetensors") for side in (folder, reference))
    one, other = (torch.cat([tensor.flatten().double() for tensor in side.values()]) for side in published)
    result["published"] = distance(one, other)
    result["numbers"] = metrics_apart(folder, reference, f"metrics/training/{name}.json")
    return result | drawn


def numbers_apart(folder: Path, reference: Path, stage: str) -> float:
    """Largest relative difference of a number that a stage without training writes."""
    if stage == "ref_logprobs":
        sides = [
            read_table(side / "data/ref_logprobs/sft/train.arrow", REFERENCE_SCHEMA)[:] for side in (folder, reference)
        ]
        pairs = [pair for name in list(sides[0])[1:] for pair in zip(*(side[name] for side in sides), strict=True)]
        return largest(abs(one - other) / abs(other) for one, other in pairs)
    return metrics_apart(folder, reference, "metrics/evaluate/dpo.json")


def metrics_apart(folder: Path, reference: Path, name: str) -> float:
    """Largest difference of a metric, relative where it is above 1; of a change, to what has changed."""
    ours, theirs = (json.loads((side / name).read_text()) for side in (folder, reference))
    assert ours.keys() == theirs.keys()
    sizes = {key: abs(theirs[key.removesuffix("_change")]) for key in theirs}
    return largest(abs(value - theirs[key]) / max(sizes[key], 1.0) for key, value in ours.items())


def largest(differences: Iterable[float]) -> float:
    """The largest; infinity if one is no number."""
    return max((value if math.isfinite(value) else math.inf) for value in differences)


def measure(project: Path, stages: list[str], precision: str, only: list[str]) -> list[dict[str, Any]]:
    """Run all configurations of this launch's number of processes. The reference runs are made by one process."""
    with inside(project):
        processes = join_processes(read_runtime("train_sft"))
    knobs = ONE_PROCESS if processes.world_size == 1 else SEVERAL_PROCESSES
    alone, commit = replace(processes, rank=0, world_size=1), measured_commit()
    if precision == "bf16":
        if processes.is_main:
            make_bf16_project(project, alone)
        processes.broadcast(None)
        project = project.with_name("project-bf16")
    rows = []
    for stage in stages:
        reference = project.parent / f"reference-{precision}-{stage}"
        if not reference.exists():
            if processes.is_main:
                probe = Probe(is_main=True)
                folder = run_stage(project, stage, PLAIN, probe, alone)
                save_file(probe.found, folder / "probe.safetensors")
                (folder / ROLLOUTS).write_text(json.dumps(probe.rollouts))
                shutil.move(folder, reference)
            processes.broadcast(None)
        for name, changes in knobs.items():
            if (only and name not in only) or not possible(changes, precision) or idle(changes, stage):
                continue
            started = time.monotonic()
            probe = Probe(processes.is_main, reference, keep_to_reference=precision == "bf16")
            folder = run_stage(project, stage, changes, probe, processes)
            if processes.is_main:
                row = {"stage": stage, "precision": precision, "processes": processes.world_size, "configuration": name}
                row |= {"commit": commit}
                rows.append({**row, **compare(probe, folder, reference, stage)})
                rows[-1]["seconds"] = round(time.monotonic() - started, 1)
                print(json.dumps(rows[-1]), flush=True)
                shutil.rmtree(folder)
    processes.leave()
    return rows


# Rounding decides which expert a token near a tie asks: with a row a pass the losses of 20 steps moved by up to 1.4e-5.
OF_EXPERTS = 5.0


def outside(row: dict[str, Any]) -> dict[str, float]:
    """What of one row of measurements is larger than the precision allows."""
    limits = limits_of(row["precision"])
    if "experts" in row["stage"]:
        limits["losses"] *= OF_EXPERTS
    return {key: row[key] for key in limits if key in row and not row[key] <= limits[key]}


def limits_of(precision: str) -> dict[str, float]:
    """What must keep to the precision's tolerance, or to another limit."""
    tolerance = TOLERANCES[precision]
    limits = dict.fromkeys(("gradient", "losses", f"weights after {STEPS} steps", "published", "numbers"), tolerance)
    limits[CHANGE] = CHANGE_TOLERANCES[precision]
    # In bf16 AdamW's first step is the sign of gradients that are rounded by a hundredth: many signs are chance.
    return limits if precision == "bf16" else limits | {"first update, steep": tolerance, "differing rollouts": 0.0}


def as_table(rows: list[dict[str, Any]]) -> str:
    """The measurements in Markdown."""
    names = ["stage", "precision", "processes", "configuration", "gradient", "first update", "first update, steep"]
    names += ["flat weights", "losses", f"weights after {STEPS} steps", CHANGE, "published", "numbers"]
    names += ["differing rollouts", "commit"]
    lines = ["| " + " | ".join(names) + " | within |", "|" + "---|" * (len(names) + 1)]
    for row in rows:
        cells = [f"{value:.1e}" if isinstance(value := row.get(name, "–"), float) else str(value) for name in names]
        lines.append("| " + " | ".join([*cells, "no" if outside(row) else "yes"]) + " |")
    return "\n".join(lines) + "\n"


def idle(knobs: dict[str, Any], stage: str) -> bool:
    """True if these knobs are about an optimizer and the stage has none."""
    return stage in MEASURING and "zero_stage" in knobs and set(knobs) <= {"engine", "zero_stage", "offload_optimizer"}


def possible(knobs: dict[str, Any], precision: str) -> bool:
    """float64 is for the plain engine; DeepSpeed without ZeRO does not train bf16 with float32 sums.

    transformers' eager attention rounds its softmax to float32, so float64 says nothing of it. Without a GPU there is
    nothing to offload activations from.
    """
    if knobs == ACTIVATIONS and not torch.cuda.is_available():
        return False
    if precision == "fp64" and knobs.get("attention") == "eager":
        return False
    plain = knobs.get("engine") == "torch" or not any(key.startswith(("zero", "engine")) for key in knobs)
    return plain if precision == "fp64" else not (precision == "bf16" and knobs.get("engine") == "deepspeed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("project", type=Path)
    parser.add_argument("--stages", nargs="+", default=[*TRAINING, *VARIANTS, *MEASURING])
    parser.add_argument("--without-lora", action="store_true", help="leave out the variants with LoRA")
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16", "fp64"])
    parser.add_argument("--only", nargs="+", default=[], help="names of configurations")
    parser.add_argument("--out", type=Path, help="JSON file to which the measurements are added")
    parser.add_argument("--table", type=Path, help="Markdown file to which all of --out is written")
    options = parser.parse_args()
    project = options.project.resolve()
    if not project.exists() and os.environ.get("RANK", "0") == "0":
        make_project(project)
    stages = [stage for stage in options.stages if not (options.without_lora and "LoRA" in stage)]
    rows = []
    for precision in options.precision:
        with in_float64() if precision == "fp64" else contextlib.nullcontext():
            rows += measure(project, stages, precision, options.only)
    if options.out and rows:
        before = json.loads(options.out.read_text()) if options.out.exists() else []
        options.out.write_text(json.dumps(before + rows, indent=1))
        if options.table:
            limits = "; ".join(
                f"{limit:.0e} in {precision}, their change to {CHANGE_TOLERANCES[precision]:.0e}"
                for precision, limit in TOLERANCES.items()
            )
            options.table.write_text(HEAD.format(limits=limits) + as_table(before + rows))
    end_process(1 if any(outside(row) for row in rows) else 0)


if __name__ == "__main__":
    main()
