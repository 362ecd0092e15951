"""Policies on a CPU with samplers around them, as a stage makes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stages.lib.compute.engine.torch import TorchEngine
from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.compute.processes import Processes
from stages.lib.data.prompts import Prompt
from stages.lib.models.lora import Lora
from stages.lib.models.pretrained import end_and_pad_ids
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.models.tokenizer_files import TOKENIZER_FILES
from stages.lib.rl.samplers.vllm_sampler import EngineHome, VllmSampler
from stages.lib.rl.samplers.vllm_weights import VllmWeights
from stages.lib.rl.trained_policy import TrainedPolicy
from stages.lib.settings.declaration import block
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.runtime import read_runtime
from stages.lib.settings.sampler import VllmSampling
from stages.lib.settings.train_grpo import TrainGrpo
from stages.lib.settings.vllm_server import VllmServer
from tests.tiny_models import CPU, batching


def policy_of(folder: Path, lora: LoraSettings | None = None) -> TrainedPolicy:
    """A policy in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    adapters = Lora(model, lora, 3, folder)
    settings = OptimizerSettings(**block(OptimizerSettings))
    engine = TorchEngine(TokenLogProbs(model), settings, 1, read_runtime("train_grpo"), Processes(0, 1, CPU))
    return TrainedPolicy(model, adapters, engine, None)


def move(policy: TrainedPolicy, by: float, seed: int = 0) -> None:
    """Let all trained weights be others, as an update would."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.engine.trained.values():
            weight.add_(by * torch.randn(weight.shape, generator=draws))
    policy.engine.changes += 1


def vllm_around(
    policy: TrainedPolicy, model: Path, home: Path, server: dict[str, Any], texts: Sequence[list[int]], **changed: Any
) -> VllmSampler:
    """A sampler that asks a server; `changed` are keys of the entry."""
    settings = TrainGrpo(**block(TrainGrpo, **{"max_new_tokens": 6, "sampler": block(VllmSampling), **changed}))
    assert isinstance(settings.sampler, VllmSampling)
    sharing = batching(10**6, pad_id=end_and_pad_ids(model)[1])
    weights = VllmWeights(policy, model, settings.sampler, VllmServer(**server), "fp32", sharing, home / "weights")
    budget = MemoryBudget("generation_batch_size", 128)
    home = EngineHome(home / "responses.sqlite", home / "weights", "code")
    return VllmSampler(weights, settings, texts, end_and_pad_ids(model)[0], str, sharing, budget, home)


def with_tokenizer(folder: Path) -> Path:
    """With files in the places of a tokenizer's, which nobody reads."""
    for name in TOKENIZER_FILES:
        (folder / name).write_text("{}")
    return folder


def prompts_of(texts: Sequence[list[int]]) -> list[Prompt]:
    return [Prompt(row, ids, [], {}) for row, ids in enumerate(texts)]
