"""The stages' own objectives and engines, timed on given ids: the counterpart of `trl_steps`.

python -m benchmarks.our_steps ORDER     # JSON, as `trl_jobs.Order` writes it
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timed_steps import peak_memory
from benchmarks.trl_jobs import Order
from stages.lib.command.params import build
from stages.lib.compute.batching import micro_batching
from stages.lib.compute.engine.choice import new_engine
from stages.lib.compute.frozen_model import frozen
from stages.lib.compute.processes import Processes, join_processes
from stages.lib.compute.sequence_logprobs import all_pair_logps
from stages.lib.data.reference_tables import LOG_PROBS
from stages.lib.models.pretrained import Loading, end_and_pad_ids, load_classifier, load_language_model
from stages.lib.models.scalar_scores import SequenceScores
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.objectives.fit import global_means
from stages.lib.objectives.preference import PreferenceObjective
from stages.lib.objectives.reward import RewardObjective
from stages.lib.objectives.sft import SftObjective
from stages.lib.settings.declaration import block
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.reward_loss import PairwiseLoss
from stages.lib.settings.runtime import Runtime, read_runtime
from stages.lib.settings.sections import default_params
from stages.lib.settings.train_dpo import TrainDpo

Rows = dict[str, list[Any]]
CHUNK = 512  # of rows_per_partial_result


class Timed:
    """A task that is set up: its steps, each on the next rows."""

    def __init__(self, order: Order, runtime: Runtime, processes: Processes) -> None:
        self.order, self.runtime, self.processes = order, runtime, processes
        self.loading = Loading("fp32", runtime, processes.device)
        self.steps = order.warm_up_steps + order.timed_steps
        loader = load_classifier if order.task == "rm" else load_language_model
        folder = Path(order.models) / ("reward" if order.task == "rm" else "policy")
        self.model = loader(folder, self.loading)
        self.batching = micro_batching(runtime, end_and_pad_ids(folder)[1], processes, self.model)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def log_probs(self) -> Callable:
        """A frozen model of its own."""
        model = load_language_model(Path(self.order.models) / "policy", self.loading)
        module = TokenLogProbs(model, chunk_tokens=self.runtime.logits_chunk_tokens)
        return frozen(module, self.runtime, self.processes)

    def with_reference(self, module: Callable, pairs: Rows) -> Rows:
        found = all_pair_logps(module, pairs, self.batching)
        return pairs | {name: side.tolist() for name, side in zip(LOG_PROBS, found, strict=True)}

    def step(self) -> Callable[[Rows], None]:
        """A function that takes one optimizer step."""
        task = self.order.task
        module = SequenceScores(self.model) if task == "rm" else TokenLogProbs(self.model)
        settings = build(OptimizerSettings, default_optimizer() | {"learning_rate": self.order.learning_rate}, "")
        engine = new_engine(module, settings, self.steps, self.runtime, self.processes)
        objective = self.objective()

        def take(rows: Rows) -> None:
            self.losses.append(global_means(objective, engine, rows, train=True)["loss"])
            self.norms.append(engine.step())

        if task != "dpo-live":
            return take
        reference = self.log_probs()
        return lambda rows: take(self.with_reference(reference, rows))

    def objective(self) -> Any:
        if self.order.task == "sft":
            return SftObjective(self.batching)
        if self.order.task == "rm":
            return RewardObjective(self.batching, PairwiseLoss(**block(PairwiseLoss, use_margin=False)))
        first = next(iter(default_params()["train_dpo"].values()))
        loss = build(TrainDpo, first, "").loss
        return PreferenceObjective(self.batching, loss.model_copy(update={"beta": self.order.beta}))


def default_optimizer() -> dict[str, Any]:
    first = next(iter(default_params()["train_sft"].values()))
    return first["optimizer"] | {"schedule": "constant", "warmup_ratio": 0.0, "weight_decay": 0.0, "beta2": 0.95}


def rows_of(pairs: list[dict[str, list[int]]], order: Order) -> list[Rows]:
    """The rows of each step, as columns; those of log-probs in chunks, as ref_logprobs takes them."""
    size = CHUNK if order.task == "reference" else order.rows
    chunks = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    columns = [{name: [pair[name] for pair in chunk] for name in chunk[0]} for chunk in chunks]
    if order.task != "sft":
        return columns
    return [
        {
            "input_ids": [p + c for p, c in zip(rows["prompt_ids"], rows["chosen_ids"], strict=True)],
            "loss_mask": [
                [0] * len(p) + [1] * len(c) for p, c in zip(rows["prompt_ids"], rows["chosen_ids"], strict=True)
            ],
        }
        for rows in columns
    ]


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def measure(order: Order, pairs: list[dict[str, list[int]]]) -> dict[str, Any]:
    runtime = build(Runtime, dict(read_runtime("train_dpo")) | {"threads": order.threads, "engine": "torch"}, "")
    processes = join_processes(runtime)
    timed = Timed(order, runtime, processes)
    rows = rows_of(pairs, order)
    spans = []
    if order.task == "reference":
        module, before = timed.log_probs(), peak_memory(processes.device)
        started = clocks()
        found = [timed.with_reference(module, chunk) for chunk in rows]
        spans = [[now - then for now, then in zip(clocks(), started, strict=True)]]
        timed.losses = [value for name in LOG_PROBS for chunk in found for value in chunk[name]]
    else:
        if order.task == "dpo":
            reference = timed.log_probs()
            rows = [timed.with_reference(reference, chunk) for chunk in rows]
            del reference
        take, before = timed.step(), peak_memory(processes.device)
        for step in rows[: timed.steps]:
            started = clocks()
            take(step)
            spans.append([now - then for now, then in zip(clocks(), started, strict=True)])
        spans = spans[order.warm_up_steps :]
    return {
        "seconds": [seconds for seconds, _ in spans],
        "processor_seconds": [processor for _, processor in spans],
        "losses": timed.losses,
        "norms": timed.norms,
        "bytes_before": before,
        "peak_bytes": peak_memory(processes.device),
        "matrix_flops": matrix_flops(),
    }


def matrix_flops() -> float:
    """FLOPs per second of a large product of float32 matrices: the peak that a step is compared with."""
    one, best = torch.randn(1536, 1536), 0.0
    for _ in range(6):
        started = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
        one @ one
        now = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
        best = max(best, 2 * 1536**3 / (now - started))
    return best


def main(path: str) -> None:
    order = Order(**json.loads(Path(path).read_text(encoding="utf-8")))
    pairs = [json.loads(line) for line in Path(order.pairs).read_text(encoding="utf-8").splitlines()]
    Path(order.out).write_text(json.dumps(measure(order, pairs)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
