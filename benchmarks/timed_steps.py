"""One configuration, timed: the objectives and engines of the stages on random tokens. Started by train_throughput.

    python -m benchmarks.timed_steps WORKLOAD CONFIGURATION MODELS RESULT

with the first two as JSON, the folder of `random_models`, and the file to write.
"""

import json
import platform
import resource
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from benchmarks.model_flops import forward_flops, peak_flops, training_flops
from benchmarks.workloads import LORA_RANK, Configuration, Workload
from stages import train_ppo
from stages.lib.command.params import build
from stages.lib.compute.batching import micro_batching
from stages.lib.compute.engine.base import Engine, require_finite
from stages.lib.compute.engine.choice import new_engine
from stages.lib.compute.processes import Processes, join_processes
from stages.lib.data.prompts import Prompt
from stages.lib.models.lora import Lora
from stages.lib.models.pretrained import Loading, end_and_pad_ids, load_language_model, new_classifier
from stages.lib.models.scalar_scores import SequenceScores
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.objectives.fit import global_means
from stages.lib.objectives.objective import Objective
from stages.lib.objectives.preference import PreferenceObjective
from stages.lib.objectives.reward import RewardObjective
from stages.lib.objectives.sft import SftObjective
from stages.lib.rl import ppo_updates
from stages.lib.rl.advantages import gae
from stages.lib.rl.ppo_loss import PpoLoss
from stages.lib.rl.rollouts import Rollouts
from stages.lib.settings.declaration import plain
from stages.lib.settings.lora import ALL_LINEAR, LoraSettings
from stages.lib.settings.runtime import Runtime, read_runtime
from stages.lib.settings.sections import default_params
from stages.lib.settings.train_dpo import TrainDpo
from stages.lib.settings.train_rm import TrainRm
from stages.lib.settings.train_sft import TrainSft

SEED = 0
LORA = LoraSettings(
    rank=LORA_RANK,
    alpha=2 * LORA_RANK,
    targets=ALL_LINEAR,
    experts=False,
    routers=False,
    rslora=False,
    base_quantization=None,
    save_adapter=False,
)


class Cost(NamedTuple):
    """What a part of a step handled: tokens of its sequences (padding not counted), and model FLOPs."""

    tokens: int
    flops: int


Part = Callable[[], Cost]


class Setup(NamedTuple):
    """What every stage is built from."""

    workload: Workload
    configuration: Configuration
    models: Path
    runtime: Runtime
    processes: Processes

    @property
    def lora(self) -> LoraSettings | None:
        return LORA if self.configuration.lora else None

    @property
    def rank(self) -> int:
        return LORA_RANK if self.configuration.lora else 0

    @property
    def steps(self) -> int:
        return self.workload.warm_up_steps + self.workload.timed_steps

    def settings(self, section: str, kind: Any, **changes: Any) -> Any:
        """The first entry of a section of the defaults, with the precision and the adapters that are measured."""
        common = {"precision": self.workload.precision, "lora": self.lora}
        first = next(iter(default_params()[section].values()))
        return build(kind, first, section).model_copy(update=common | changes)

    def batching(self) -> Any:
        return micro_batching(self.runtime, end_and_pad_ids(self.models / "policy")[1], self.processes)

    def loading(self) -> Loading:
        return Loading(self.workload.precision, self.runtime, self.processes.device)

    def language_model(self) -> Any:
        path = self.models / "policy"
        model = load_language_model(path, self.loading())
        Lora(model, self.lora, SEED, path)
        return model

    def engine(self, module: Any, settings: Any) -> Engine:
        return new_engine(module, settings.optimizer, self.steps, self.runtime, self.processes)


def sft(setup: Setup) -> dict[str, Part]:
    """Cross-entropy at every token but the first."""
    settings = setup.settings("train_sft", TrainSft)
    module = TokenLogProbs(setup.language_model(), chunk_tokens=setup.runtime.logits_chunk_tokens)
    engine, objective = setup.engine(module, settings), SftObjective(setup.batching())
    lengths = sequence_lengths(setup)
    sequences = random_sequences(setup.workload, lengths)
    rows = {"input_ids": sequences, "loss_mask": [[False] + [True] * (length - 1) for length in lengths]}
    logit_tokens = sum(lengths) - len(lengths)
    cost = Cost(sum(lengths), training_flops(setup.workload.architecture, lengths, logit_tokens, setup.rank))

    def step() -> Cost:
        require_finite(global_means(objective, engine, rows, train=True)["loss"], "loss", engine.steps_taken)
        engine.step()
        return cost

    return {"step": step}


def rm(setup: Setup) -> dict[str, Part]:
    """Pairs of whole sequences, each read at its end."""
    settings = setup.settings("train_rm", TrainRm)
    path = setup.models / "policy"
    classifier = new_classifier(path, setup.loading(), SEED)
    Lora(classifier, setup.lora, SEED, path)
    engine = setup.engine(SequenceScores(classifier), settings)
    return pair_step(setup, engine, RewardObjective(setup.batching(), settings.loss), needs_logits=False)


def dpo(setup: Setup) -> dict[str, Part]:
    """The same pairs, with log-probs of the second half of each sequence; those of the reference are given."""
    settings = setup.settings("train_dpo", TrainDpo)
    module = TokenLogProbs(setup.language_model(), chunk_tokens=setup.runtime.logits_chunk_tokens)
    engine = setup.engine(module, settings)
    return pair_step(setup, engine, PreferenceObjective(setup.batching(), settings.loss), needs_logits=True)


def pair_step(setup: Setup, engine: Engine, objective: Objective, *, needs_logits: bool) -> dict[str, Part]:
    """A step of a pair loss. The two sequences of a pair share the first half."""
    lengths = sequence_lengths(setup)[::2]
    prompts = random_sequences(setup.workload, [length // 2 for length in lengths])
    chosen, rejected = (
        random_sequences(setup.workload, [length - length // 2 for length in lengths], seed) for seed in (1, 2)
    )
    pairs = {"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": rejected}
    pairs |= {f"reference_{side}_logps": [0.0] * len(lengths) for side in ("chosen", "rejected")}
    logit_tokens = sum(len(ids) for ids in chosen + rejected) if needs_logits else 0
    flops = training_flops(setup.workload.architecture, lengths * 2, logit_tokens, setup.rank)
    cost = Cost(2 * sum(lengths), flops)

    def step() -> Cost:
        require_finite(global_means(objective, engine, pairs, train=True)["loss"], "loss", engine.steps_taken)
        engine.step()
        return cost

    return {"step": step}


def ppo(setup: Setup) -> dict[str, Part]:
    """A phase: sample and judge rollouts, then one update of policy and critic on all of them.

    Model FLOPs count sampling as one forward pass, each of critic, reference and reward model as another, and the
    training of policy and critic. The policy's own log-probs of what it sampled are needed once: the forward pass that
    computes them again counts as none.
    """
    workload, architecture = setup.workload, setup.workload.architecture
    policy, reward_model = str(setup.models / "policy"), str(setup.models / "reward")
    settings = setup.settings(
        "train_ppo",
        train_ppo.TrainPpo,
        model=policy,
        reference=policy,
        reward_model=reward_model,
        iterations=setup.steps,
        rollout_batch_size=workload.sequences,
        minibatch_size=workload.sequences,
        max_new_tokens=workload.new_tokens,
        epochs=1,
        critic_warmup_iterations=0,
    )
    critic = settings.critic.model_copy(update={"path": reward_model})
    settings = settings.model_copy(update={"critic": critic})
    this_run = SimpleNamespace(
        scratch=None,
        processes=setup.processes,
        may_stop=lambda: None,
        stage="train_ppo@ppo",
        runtime=setup.loading().runtime,
    )
    sequences = random_sequences(workload, [length - workload.new_tokens for length in sequence_lengths(setup)])
    table = Dataset.from_dict({"prompt_ids": sequences})
    parts = train_ppo.load_parts(settings, SEED, setup.loading(), setup.processes, str, this_run, table, None)
    prompts = [Prompt(row, ids, [], {}) for row, ids in enumerate(sequences)]
    phases: list[Rollouts] = []

    def sizes() -> tuple[list[int], int]:
        responses = [len(episode.ids) for episode in phases[-1].episodes]
        return [len(ids) + new for ids, new in zip(sequences, responses, strict=True)], sum(responses)

    def rollouts() -> Cost:
        phases.append(parts.collector.collect(prompts, len(phases)))
        lengths, new = sizes()
        by_policy, by_critic = (forward_flops(architecture, lengths, logits, setup.rank) for logits in (new, 0))
        by_reference, by_reward_model = (forward_flops(architecture, lengths, logits) for logits in (new, 0))
        return Cost(sum(lengths), by_policy + by_critic + by_reference + by_reward_model)

    def update() -> Cost:
        phase = phases[-1]
        loss = PpoLoss(settings, *gae(phase, settings))
        ppo_updates.update(settings, SEED, len(phases) - 1, *ppo_updates.learners(parts, phase, loss, warms_up=False))
        lengths, new = sizes()
        both = [training_flops(architecture, lengths, logits, setup.rank) for logits in (new, 0)]
        return Cost(sum(lengths), sum(both))

    return {"rollouts": rollouts, "update": update}


PARTS = {"sft": sft, "rm": rm, "dpo": dpo, "ppo": ppo}


def sequence_lengths(setup: Setup) -> list[int]:
    """Tokens of the sequences of a step: all alike, or spread evenly from an eighth of the longest to the longest."""
    longest, count = setup.workload.sequence_length, setup.workload.sequences
    if not setup.configuration.mixed_lengths:
        return [longest] * count
    return [int(length) for length in np.linspace(longest // 8, longest, count)]


def random_sequences(workload: Workload, lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Token ids drawn uniformly, EOS and pad left out."""
    generator = np.random.default_rng(seed)
    return [generator.integers(workload.architecture.vocabulary - 2, size=length).tolist() for length in lengths]


def prepare(workload: Workload, configuration: Configuration, models: Path) -> Setup:
    """`runtime.yaml` decides what is not compared: the device, the threads, the chunks of logits."""
    section = f"train_{configuration.stage}"
    wanted = {
        "attention": configuration.attention,
        "gradient_checkpointing": configuration.checkpointing,
        "activation_offload": configuration.offload,
        "packing": configuration.packing,
        "micro_batch_tokens": workload.micro_batch_tokens,
        "generation_batch_size": workload.sequences,
        "engine": "torch",
        "zero_stage": 0,
        "offload_optimizer": False,
        "offload_parameters": False,
        "frozen_zero_stage": 0,
        "frozen_offload_parameters": False,
        "deepspeed": {},
    }
    runtime = build(Runtime, dict(read_runtime(section)) | wanted, "the benchmark's runtime")
    return Setup(workload, configuration, models, runtime, join_processes(runtime))


def timed(part: Part, device: torch.device) -> tuple[float, Cost]:
    """Seconds of one part, the GPU's work included, and its cost."""
    synchronize(device)
    started = time.perf_counter()
    cost = part()
    synchronize(device)
    return time.perf_counter() - started, cost


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(setup: Setup) -> dict[str, Any]:
    """Run warm-up and timed steps. Returns seconds of each step, and the rates of each part and of all together."""
    device = setup.processes.device
    parts = PARTS[setup.configuration.stage](setup)
    for _ in range(setup.workload.warm_up_steps):
        for part in parts.values():
            timed(part, device)
    taken = {name: [] for name in parts}
    for _ in range(setup.workload.timed_steps):
        for name, part in parts.items():
            taken[name].append(timed(part, device))
    results = {name: rates(steps, setup) for name, steps in taken.items()}
    if len(parts) > 1:
        whole = [
            (sum(seconds for seconds, _ in step), Cost(step[0][1].tokens, sum(cost.flops for _, cost in step)))
            for step in zip(*taken.values(), strict=True)
        ]
        results = {"step": rates(whole, setup), **results}
    return results


def rates(steps: list[tuple[float, Cost]], setup: Setup) -> dict[str, Any]:
    """Tokens per second and MFU over all timed steps; `mfu` is None where the peak is not known or not that of bf16."""
    seconds = sum(one for one, _ in steps)
    flops = sum(cost.flops for _, cost in steps)
    peak = peak_flops(device_name(setup.processes.device)) if setup.workload.precision == "bf16" else None
    return {
        "tokens_per_second": sum(cost.tokens for _, cost in steps) / seconds,
        "step_seconds": [one for one, _ in steps],
        "tokens": [cost.tokens for _, cost in steps],
        "model_flops": [cost.flops for _, cost in steps],
        "model_flops_per_second": flops / seconds,
        "mfu": None if peak is None else flops / seconds / peak,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that tensors took, on a CPU the most that the process took, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_machine(device: torch.device) -> dict[str, Any]:
    machine = {"device": device_name(device), "torch": torch.__version__, "transformers": version("transformers")}
    if device.type == "cuda":
        machine |= {"cuda": torch.version.cuda, "memory_bytes": torch.cuda.get_device_properties(device).total_memory}
    return machine


def is_out_of_memory(error: Exception) -> bool:
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return on_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)


def main(workload: str, configuration: str, models: str, result: str) -> None:
    """Measure, and write what came of it; a failure too."""
    setup = prepare(Workload(**json.loads(workload)), Configuration(**json.loads(configuration)), Path(models))
    device = setup.processes.device
    found: dict[str, Any] = {"status": "measured", "machine": describe_machine(device)}
    try:
        found["parts"] = measure(setup)
    except Exception as error:  # whatever it is, it becomes this configuration's row, and the others still run
        traceback.print_exc()
        message = " ".join(str(error).split())[:200]
        found["status"] = "out of memory" if is_out_of_memory(error) else f"failed: {type(error).__name__}: {message}"
    found["peak_memory_bytes"] = peak_memory(device)
    found["runtime"] = plain(setup.runtime)
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
