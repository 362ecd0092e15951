"""The policy of an RL stage: its model, its engine, its adapters, and the reference that its KL is measured to."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stages.lib.compute.engine.base import Engine
from stages.lib.compute.engine.choice import new_engine
from stages.lib.compute.frozen_model import frozen
from stages.lib.compute.processes import Processes
from stages.lib.models.lora import Lora
from stages.lib.models.model_facts import read_config
from stages.lib.models.policy_with_values import PolicyWithValues
from stages.lib.models.pretrained import Loading, load_language_model
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.shared_base import WithoutAdapters
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.optimizer import OptimizerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TrainedPolicy(NamedTuple):
    """Engine and reference give the log-probs of tokens, the engine their entropies too; there may be no reference."""

    language_model: "PreTrainedModel"
    lora: Lora
    engine: Engine
    reference: Callable | None

    def read_beside(self, model: Path, reference: Path | None) -> "tuple[PreTrainedModel | None, ...]":
        """What reads the same batches, as `micro_batching` asks: a reference of another kind may share no prompts.

        Args:
            model, reference: the folders of both.
        """
        alike = self.reference is None or reference is None or same_kind(model, reference)
        return (self.language_model, *(() if alike else (None,)))


def load_policy(
    path: Path,
    reference: Path | None,
    lora_settings: LoraSettings | None,
    optimizer: OptimizerSettings,
    updates: int,
    seed: int,
    loading: Loading,
    processes: Processes,
    *,
    entropy_gradient: bool = False,
    value_head: bool = False,
) -> TrainedPolicy:
    """Load a policy to be trained for so many updates, and its reference, if there is to be one.

    Where the reference is the model that a policy with adapters starts from, it is the policy without them, else a
    model of its own.

    Args:
        entropy_gradient: the engine's entropies carry gradient in updates.
        value_head: the engine gives values, too, as `PolicyWithValues` does.
    """
    runtime = loading.runtime
    chunks = runtime.logits_chunk_tokens
    language_model = load_language_model(path, loading)
    lora = Lora(language_model, lora_settings, seed, path)
    options = {"chunk_tokens": chunks, "entropy_gradient": entropy_gradient}
    if value_head:
        module = PolicyWithValues(language_model, **options, seed=seed)
    else:
        module = TokenLogProbs(language_model, **options, with_entropies=True)
    engine = new_engine(module, optimizer, updates, runtime, processes)
    if reference is None:
        return TrainedPolicy(language_model, lora, engine, None)
    if lora_settings and reference == path:
        return TrainedPolicy(language_model, lora, engine, WithoutAdapters(engine, lora))
    other = load_language_model(reference, replace(loading, frozen=True))
    return TrainedPolicy(
        language_model, lora, engine, frozen(TokenLogProbs(other, chunk_tokens=chunks), runtime, processes)
    )


def same_kind(one: Path, other: Path) -> bool:
    """Whether the models of two folders attend alike."""
    first, second = read_config(one), read_config(other)
    return all(first.get(name) == second.get(name) for name in ("model_type", "sliding_window", "layer_types"))
