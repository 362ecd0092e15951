"""The critic of PPO, and the reward model that scores whole responses; with adapters they may be one model."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from stages.lib.command.errors import StageError
from stages.lib.compute.batching import MicroBatching
from stages.lib.compute.engine.base import Engine
from stages.lib.compute.engine.choice import new_engine
from stages.lib.compute.processes import Processes
from stages.lib.models.lora import Lora
from stages.lib.models.pretrained import Loading
from stages.lib.models.reward_head import HeadReading, find_any_head, find_reward_head, linear_layers, score_scale
from stages.lib.models.reward_models import load_critic_start, reads_last_token
from stages.lib.models.scalar_scores import SequenceScores, TokenScores
from stages.lib.rl.rewards.reward_model import RewardModel, facts_of_reward, load_reward_model
from stages.lib.rl.shared_base import FirstHead, WithoutAdapters
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.reward_reading import RewardReading, RewardSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TrainedCritic(NamedTuple):
    """The engine gives a value at each token, the reward model a score of each response."""

    engine: Engine | None  # None where the policy has a value head
    reward_model: RewardModel | None  # None where none takes part, or it shares nothing with the critic
    lora: Lora | None  # around what the engine trains


def load_critic(
    critic: Path,
    reward_model: Path | None,
    policy: Path,
    reading: RewardSettings,
    lora_settings: LoraSettings | None,
    optimizer: OptimizerSettings,
    updates: int,
    seed: int,
    loading: Loading,
    batching: MicroBatching,
    processes: Processes,
) -> TrainedCritic:
    """Load a critic to be trained for so many updates from a reward model or a language model, and the reward model.

    Where the critic starts as the reward model and has adapters, the reward model is the critic without them and with
    its first head, else a model of its own.

    Args:
        reward_model: None where none takes part.
        reading: how the reward model is read, and so the critic that starts from the same folder. Its scores may be
            standardised, the critic's values are not: it learns by itself what returns are like.
        batching: of passes over the policy's ids.
    Raises:
        StageError: one of them cannot be loaded, or the critic's head or label would have to be named.
    """
    others = reward_model is not None and critic != reward_model
    of_critic = reading_of_other(critic, reward_model) if others else reading
    classifier = cast("PreTrainedModel", load_critic_start(critic, of_critic, loading, seed, policy))
    lora = Lora(classifier, lora_settings, seed, critic)
    if reward_model is None:
        engine = new_engine(TokenScores(classifier), optimizer, updates, loading.runtime, processes)
        return TrainedCritic(engine, None, lora)
    # Under ZeRO 3 weights can only be read through the engine that shards them, which knows no second head.
    shared = lora_settings and loading.runtime.zero_stage < 3 and critic == reward_model
    head = find_reward_head(reward_model, reading)
    first_head = FirstHead(classifier) if shared and reads_last_token(reward_model, head) else None
    engine = new_engine(TokenScores(classifier), optimizer, updates, loading.runtime, processes)
    if first_head is None:
        of_rewards = (reward_model, reading, loading, batching, processes, policy)
        return TrainedCritic(engine, load_reward_model(*of_rewards, standardise=reading.standardise_reward), lora)
    scores = SequenceScores(cast("PreTrainedModel", first_head))  # which reads its body and its head alone
    facts = facts_of_reward(reward_model, head, scores, None)
    scale = score_scale(reward_model, head) if reading.standardise_reward else None
    unadapted = WithoutAdapters(scores, lora)
    return TrainedCritic(engine, RewardModel(unadapted, batching, None, reward_model, facts, scale), lora)


def reading_of_other(critic: Path, reward_model: Path) -> HeadReading:
    """How a critic is read that does not start from the reward model: with nothing named.

    Raises StageError if that does not say which head or label it is.
    """
    reading = RewardReading(reward_head=None, reward_label=None)
    linear_layers(critic)  # which raises what is wrong with the folder itself
    try:
        find_any_head(critic, reading)
    except StageError:
        raise StageError(
            f"critic {critic} has several heads or labels, and reward_head and reward_label name those of "
            f"{reward_model} alone: let critic name {reward_model}, or a language model (its body with a new head)"
        ) from None
    return reading
