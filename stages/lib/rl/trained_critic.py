"""The critic of PPO, and the reward model that it started as."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from stages.lib.compute.engine.base import Engine
from stages.lib.compute.engine.choice import new_engine
from stages.lib.compute.frozen_model import frozen
from stages.lib.compute.processes import Processes
from stages.lib.models.lora import Lora
from stages.lib.models.pretrained import Loading, load_classifier
from stages.lib.models.scalar_scores import SequenceScores, TokenScores
from stages.lib.rl.shared_base import FirstHead, WithoutAdapters
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.optimizer import OptimizerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TrainedCritic(NamedTuple):
    """The engine gives a value at each token, the reward model a score of each sequence."""

    engine: Engine
    reward_model: Callable


def load_critic(
    path: Path,
    lora_settings: LoraSettings | None,
    optimizer: OptimizerSettings,
    updates: int,
    seed: int,
    loading: Loading,
    processes: Processes,
) -> TrainedCritic:
    """Load a critic to be trained for so many updates from a reward model, and that reward model.

    With adapters the reward model is the critic without them and with its first head, else a second copy.
    """
    runtime = loading.runtime
    classifier = load_classifier(path, loading)
    lora = Lora(classifier, lora_settings, seed, path)
    # Under ZeRO 3 weights can only be read through the engine that shards them, which knows no second head.
    first_head = FirstHead(classifier) if lora_settings and runtime.zero_stage < 3 else None
    engine = new_engine(TokenScores(classifier), optimizer, updates, runtime, processes)
    if first_head:
        scores = SequenceScores(cast("PreTrainedModel", first_head))  # which reads its body and its head alone
        return TrainedCritic(engine, WithoutAdapters(scores, lora))
    return TrainedCritic(engine, load_reward_model(path, loading, processes))


def load_reward_model(path: Path, loading: Loading, processes: Processes) -> Callable:
    """A reward model that nothing trains."""
    classifier = load_classifier(path, replace(loading, frozen=True))
    return frozen(SequenceScores(classifier), loading.runtime, processes)
