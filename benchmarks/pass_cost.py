"""Measure what `runtime.yaml: pass_cost` should say on this machine, for a model: passes of several shapes, fitted.

    python -m benchmarks.pass_cost models/base --stage train_dpo

Timed are forward and backward passes of log-probs over random ids, as `runtime.yaml` has the stage run (device,
threads, attention). With n rows of t tokens the best of some repetitions is fitted by least squares of relative errors:

    seconds = a + b n t + c n t²,    overhead = a / b,    attention = b / c
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from stages.lib.command.run import run
from stages.lib.compute.processes import join_processes
from stages.lib.models.pretrained import Loading, facts_of, load_language_model
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.settings.runtime import PassCost, read_runtime

SHAPES = ((1, 16), (1, 64), (4, 64), (16, 64), (1, 256), (4, 256), (8, 256), (1, 512), (2, 512), (4, 512), (2, 1024))


def seconds_of(module: TokenLogProbs, rows: int, width: int, device: torch.device, repeats: int) -> float:
    """The least time of a forward and backward pass over rows of random ids, half of them completion tokens."""
    vocabulary = facts_of(module.language_model).vocab_size or 2
    ids = torch.randint(vocabulary, (rows, width), device=device, generator=torch.Generator(device).manual_seed(0))
    positions = torch.arange(width, device=device).expand(rows, width)
    best = float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        module(ids, None, positions, positions >= width // 2).logps.sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def fitted(seconds: dict[tuple[int, int], float]) -> PassCost:
    """The constants of shapes (rows, width) and their times."""
    shapes = np.array([*seconds], dtype=float)
    taken = np.array([*seconds.values()])
    tokens = shapes.prod(axis=1)
    terms = np.stack([np.ones_like(tokens), tokens, tokens * shapes[:, 1]], axis=1)
    constant, linear, square = np.linalg.lstsq(terms / taken[:, None], np.ones_like(taken), rcond=None)[0]
    return PassCost(
        overhead=max(1, round(constant / linear)),
        attention=min(10**9, round(linear / square)) if square > 0 else 10**9,
    )


def main(
    model: Annotated[Path, typer.Argument(help="folder of a language model")],
    stage: Annotated[str, typer.Option(help="whose section of runtime.yaml holds")] = "train_dpo",
    precision: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    repeats: Annotated[int, typer.Option(help="of each shape, of which the least time counts")] = 5,
) -> None:
    """Measure the cost of passes."""
    runtime = read_runtime(stage)
    processes = join_processes(runtime)
    language_model = load_language_model(model, Loading(precision, runtime, processes.device))
    module = TokenLogProbs(language_model, chunk_tokens=runtime.logits_chunk_tokens)
    longest = facts_of(language_model).positions or SHAPES[-1][1]
    shapes = [shape for shape in SHAPES if shape[1] <= longest]
    seconds_of(module, *shapes[0], processes.device, 2)
    seconds = {shape: seconds_of(module, *shape, processes.device, repeats) for shape in shapes}
    for (rows, width), taken in seconds.items():
        print(f"{rows:4} rows of {width:5} tokens  {taken * 1e3:9.2f} ms  {taken / rows / width * 1e6:8.1f} µs a token")
    cost = fitted(seconds)
    kind = "gpu" if processes.device.type == "cuda" else "cpu"
    print(f"pass_cost: {{{kind}: {{overhead: {cost.overhead}, attention: {cost.attention}}}}}")


if __name__ == "__main__":
    run(main)
