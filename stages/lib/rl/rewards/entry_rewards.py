"""The reward of an entry of params.yaml, made of its reward model and its `rewards`."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from stages.lib.compute.batching import MicroBatching
from stages.lib.compute.processes import Processes
from stages.lib.data.chat import load_tokenizer
from stages.lib.data.encoding import decode
from stages.lib.models.ensembles import is_ensemble, member_names, read_members
from stages.lib.models.pretrained import Loading
from stages.lib.rl.rewards.function_rewards import format_verifier, math_verifier, user_function
from stages.lib.rl.rewards.judge import JudgeScores
from stages.lib.rl.rewards.kept_answers import KeptAnswers
from stages.lib.rl.rewards.kept_rewards import KeptRewards
from stages.lib.rl.rewards.length_rewards import CosineLength, Overlong, Repetition
from stages.lib.rl.rewards.mixture import Mixture, MixturePart
from stages.lib.rl.rewards.remote import RemoteScores
from stages.lib.rl.rewards.reward_model import RewardModel, load_reward_model
from stages.lib.rl.rewards.server_calls import server_calls
from stages.lib.rl.rewards.verified_answers import FinalAnswer
from stages.lib.settings.rewards import (
    REWARD_MODEL,
    AnyReward,
    CosineLengthReward,
    FinalAnswerReward,
    FormatReward,
    FunctionReward,
    MathReward,
    MixedRewards,
    OverlongReward,
    RepetitionReward,
)
from stages.lib.settings.runtime import Runtime
from stages.lib.settings.served_rewards import JudgeReward, RemoteReward


class RewardSurroundings(NamedTuple):
    """What rewards are made for.

    Args:
        policy: a model folder with the tokenizer of the ids to be scored.
        max_new_tokens: of a response.
    """

    policy: Path
    max_new_tokens: int
    runtime: Runtime
    processes: Processes


def remote_scores(settings: RemoteReward, around: RewardSurroundings) -> RemoteScores:
    calls = server_calls(settings.server, around.runtime)
    return RemoteScores(
        settings, calls, partial(decode, load_tokenizer(around.policy)), around.processes, KeptAnswers()
    )


def judge_scores(settings: JudgeReward, around: RewardSurroundings) -> JudgeScores:
    return JudgeScores(settings, server_calls(settings.server, around.runtime), around.processes, KeptAnswers())


MAKERS: dict[type, Callable[[Any, RewardSurroundings], Any]] = {
    CosineLengthReward: lambda settings, around: CosineLength(settings, around.max_new_tokens),
    OverlongReward: lambda settings, around: Overlong(settings, around.max_new_tokens),
    RepetitionReward: lambda settings, _: Repetition(settings),
    FinalAnswerReward: lambda settings, _: FinalAnswer(settings),
    FormatReward: lambda settings, around: format_verifier(settings, around.processes, around.runtime.worker_count),
    FunctionReward: lambda settings, around: user_function(settings, around.processes, around.runtime.worker_count),
    MathReward: lambda settings, around: math_verifier(settings, around.processes, around.runtime.worker_count),
    RemoteReward: remote_scores,
    JudgeReward: judge_scores,
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
    kept: KeptRewards | None = None,
) -> Mixture:
    """The reward of an entry.

    Args:
        policy: a model folder with the tokenizer of the ids to be scored.
        max_new_tokens: of a response.
        loaded: its reward model, if that has been loaded.
        kept: what other rewards than a reward model said before in this run.
    Raises:
        StageError: as `load_reward_model`.
    """
    path, models = Path(settings.reward_model), {}
    how = (loading, batching, processes, policy)
    if is_ensemble(path):
        for name, member in read_members(path).items():
            scores = load_reward_model(Path(member.reward_model), member, *how, standardise=member.standardise_reward)
            weight = settings.reward_model_weight * member.weight
            models[name] = MixturePart(scores, weight, settings.reward_model_where)
    elif settings.has_reward_model:
        scores = loaded or load_reward_model(path, settings, *how, standardise=settings.standardise_reward)
        models[REWARD_MODEL] = MixturePart(scores, settings.reward_model_weight, settings.reward_model_where)
    around = RewardSurroundings(policy, max_new_tokens, loading.runtime, processes)
    return Mixture({**models, **reward_parts(settings.rewards, around)}, kept if settings.rewards else None)


def reward_parts(rewards: Mapping[str, AnyReward], around: RewardSurroundings) -> dict[str, MixturePart]:
    """Rewards by name, as parts of a mixture."""
    return {
        name: MixturePart(MAKERS[type(settings)](settings, around), settings.weight, settings.where, settings.missing)
        for name, settings in rewards.items()
    }
