"""The policy of an RL stage: its model, its engine, its adapters, and the reference that it started as."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stages.lib.compute.engine.base import Engine
from stages.lib.compute.engine.choice import new_engine
from stages.lib.compute.frozen_model import frozen
from stages.lib.compute.processes import Processes
from stages.lib.models.lora import Lora
from stages.lib.models.pretrained import Loading, load_language_model
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.shared_base import WithoutAdapters
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.optimizer import OptimizerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TrainedPolicy(NamedTuple):
    """Engine and reference give the log-probs of tokens, the engine their entropies too."""

    language_model: "PreTrainedModel"
    lora: Lora
    engine: Engine
    reference: Callable


def load_policy(
    path: Path,
    lora_settings: LoraSettings | None,
    optimizer: OptimizerSettings,
    updates: int,
    seed: int,
    loading: Loading,
    processes: Processes,
) -> TrainedPolicy:
    """Load a policy to be trained for so many updates.

    With adapters the reference is the policy without them, else a second copy of the model.
    """
    runtime = loading.runtime
    chunks = runtime.logits_chunk_tokens
    language_model = load_language_model(path, loading)
    lora = Lora(language_model, lora_settings, seed, path)
    module = TokenLogProbs(language_model, chunk_tokens=chunks, with_entropies=True)
    engine = new_engine(module, optimizer, updates, runtime, processes)
    if lora_settings:
        return TrainedPolicy(language_model, lora, engine, WithoutAdapters(engine, lora))
    copy = load_language_model(path, replace(loading, frozen=True))
    reference = frozen(TokenLogProbs(copy, chunk_tokens=chunks), runtime, processes)
    return TrainedPolicy(language_model, lora, engine, reference)
