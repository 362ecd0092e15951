"""The reward of an entry of params.yaml, made of its reward model and its `rewards`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stages.lib.compute.batching import MicroBatching
from stages.lib.compute.processes import Processes
from stages.lib.models.ensembles import is_ensemble, member_names, read_members
from stages.lib.models.pretrained import Loading
from stages.lib.rl.rewards.function_rewards import format_verifier, math_verifier, user_function
from stages.lib.rl.rewards.length_rewards import CosineLength, Overlong, Repetition
from stages.lib.rl.rewards.mixture import Mixture, MixturePart
from stages.lib.rl.rewards.reward_model import RewardModel, load_reward_model
from stages.lib.settings.rewards import (
    REWARD_MODEL,
    AnyReward,
    CosineLengthReward,
    FormatReward,
    FunctionReward,
    MathReward,
    MixedRewards,
    OverlongReward,
    RepetitionReward,
)


class Circumstances(NamedTuple):
    """What rewards are made for."""

    max_new_tokens: int  # of a response
    processes: Processes
    workers: int  # processes that a function runs in


MAKERS: dict[type, Callable[[Any, Circumstances], Any]] = {
    CosineLengthReward: lambda settings, made_for: CosineLength(settings, made_for.max_new_tokens),
    OverlongReward: lambda settings, made_for: Overlong(settings, made_for.max_new_tokens),
    RepetitionReward: lambda settings, _: Repetition(settings),
    FormatReward: lambda settings, made_for: format_verifier(settings, made_for.processes, made_for.workers),
    FunctionReward: lambda settings, made_for: user_function(settings, made_for.processes, made_for.workers),
    MathReward: lambda settings, made_for: math_verifier(settings, made_for.processes, made_for.workers),
}


def part_names(settings: MixedRewards) -> list[str]:
    """The names of the parts of an entry's reward, before it is loaded."""
    models = [REWARD_MODEL] if settings.has_reward_model else []
    if is_ensemble(Path(settings.reward_model)):
        models = member_names(Path(settings.reward_model))
    return [*models, *settings.rewards]


def single_reward_model(settings: MixedRewards) -> Path | None:
    """The folder of an entry's reward model; None where none takes part, or several do."""
    path = Path(settings.reward_model)
    return path if settings.has_reward_model and not is_ensemble(path) else None


def load_entry_rewards(
    settings: MixedRewards,
    policy: Path,
    max_new_tokens: int,
    loading: Loading,
    batching: MicroBatching,
    processes: Processes,
    loaded: RewardModel | None = None,
) -> Mixture:
    """The reward of an entry.

    Args:
        policy: a model folder with the tokenizer of the ids to be scored.
        max_new_tokens: of a response.
        loaded: its reward model, if that has been loaded.
    Raises:
        StageError: as `load_reward_model`.
    """
    path, models = Path(settings.reward_model), {}
    how = (loading, batching, processes, policy)
    if is_ensemble(path):
        for name, member in read_members(path).items():
            scores = load_reward_model(Path(member.reward_model), member, *how, standardise=member.standardise_reward)
            models[name] = MixturePart(scores, settings.reward_model_weight * member.weight)
    elif settings.has_reward_model:
        scores = loaded or load_reward_model(path, settings, *how, standardise=settings.standardise_reward)
        models[REWARD_MODEL] = MixturePart(scores, settings.reward_model_weight)
    made_for = Circumstances(max_new_tokens, processes, loading.runtime.worker_count)
    return Mixture({**models, **reward_parts(settings.rewards, made_for)})


def reward_parts(rewards: Mapping[str, AnyReward], made_for: Circumstances) -> dict[str, MixturePart]:
    """Rewards by name, as parts of a mixture."""
    return {
        name: MixturePart(MAKERS[type(settings)](settings, made_for), settings.weight, settings.where, settings.missing)
        for name, settings in rewards.items()
    }
