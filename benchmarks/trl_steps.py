"""TRL's trainers, timed on given ids. Runs in an environment of its own (`requirements-trl.txt`), without the project.

python benchmarks/trl_steps.py ORDER     # JSON, as `trl_jobs.Order` writes it
"""

import json
import resource
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


def clocks():
    return time.perf_counter(), time.process_time()


class Clock(TrainerCallback):
    """Notes the time at the end of each step: what lies between two of them is a whole step, its data included."""

    def __init__(self):
        self.ends, self.losses, self.norms = [], [], []

    def on_step_end(self, _args, _state, _control, **_rest):
        self.ends.append(clocks())

    def on_log(self, _args, _state, _control, *, logs, **_rest):
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.norms.append(logs["grad_norm"])


class TokenDPOTrainer(DPOTrainer):
    """TRL's, given ids where it would make them of text, and log-probs of the reference where it would compute them."""

    def _prepare_dataset(self, dataset, *_args, **_rest):
        return dataset

    def _precompute_ref_logps(self, dataset, *args):
        if set(REFERENCE) <= set(dataset.column_names):
            return dataset
        started = clocks()
        computed = super()._precompute_ref_logps(dataset, *args)
        self.precomputed_in = [now - then for now, then in zip(clocks(), started, strict=True)]
        return computed


def options(order, folder):
    return {
        "output_dir": folder,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "per_device_train_batch_size": order.rows,
        "max_steps": order.warm_up_steps + order.timed_steps,
        "learning_rate": order.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def trainer_of(order, pairs, folder):
    models, common = Path(order.models), options(order, folder)
    kind = AutoModelForSequenceClassification if order.task == "rm" else AutoModelForCausalLM
    path = models / ("reward" if order.task == "rm" else "policy")
    model, tokenizer = kind.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)
    clock = Clock()
    shared = {"processing_class": tokenizer, "callbacks": [clock]}
    if order.task == "sft":
        rows = [
            {
                "input_ids": pair["prompt_ids"] + pair["chosen_ids"],
                "labels": [-100] * len(pair["prompt_ids"]) + pair["chosen_ids"],
            }
            for pair in pairs
        ]
        return SFTTrainer(model, args=SFTConfig(**common), train_dataset=Dataset.from_list(rows), **shared), clock
    if order.task == "rm":
        rows = [{side: pair["prompt_ids"] + pair[side] for side in ("chosen_ids", "rejected_ids")} for pair in pairs]
        args = RewardConfig(**common)
        return RewardTrainer(model, args=args, train_dataset=Dataset.from_list(rows), **shared), clock
    precompute = order.task != "dpo-live"
    args = DPOConfig(**common, beta=order.beta, precompute_ref_log_probs=precompute)
    data = Dataset.from_list(pairs)
    return TokenDPOTrainer(model, args=args, train_dataset=data, **shared), clock


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(order, pairs):
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = trainer_of(order, pairs, folder)
        before = peak_bytes()
        if order.task == "reference":
            seconds, processor = trainer.precomputed_in
            values = [list(trainer.train_dataset[name]) for name in REFERENCE]
            flat = [float(value) for side in values for value in side]
            return {"seconds": [seconds], "processor_seconds": [processor], "losses": flat, "norms": []}, before
        trainer.train()
    spans = [[later - earlier for earlier, later in zip(*pair, strict=True)] for pair in pairwise(clock.ends)]
    timed = spans[-order.timed_steps :]
    return {
        "seconds": [seconds for seconds, _ in timed],
        "processor_seconds": [processor for _, processor in timed],
        "losses": clock.losses,
        "norms": clock.norms,
    }, before


def main(path):
    order = SimpleNamespace(**json.loads(Path(path).read_text()))
    torch.set_num_threads(order.threads)
    logging.set_verbosity_error()
    pairs = [json.loads(line) for line in Path(order.pairs).read_text().splitlines()]
    found, before = measure(order, pairs)
    found |= {"peak_bytes": peak_bytes(), "bytes_before": before}
    Path(order.out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
