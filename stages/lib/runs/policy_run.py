"""What an RL stage records of a phase, and what it publishes: policy, adapter if asked for, and rollouts."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from stages.lib.rl.rewards.kept_answers import KeptAnswers
from stages.lib.rl.rewards.kept_rewards import KeptRewards
from stages.lib.rl.rewards.mixture import Mixture
from stages.lib.rl.rewards.reward_model import RewardModel
from stages.lib.rl.rewards.scoring import Reward
from stages.lib.rl.rollout_log import RolloutLog
from stages.lib.rl.rollouts import Rollouts
from stages.lib.rl.symptoms import new_in
from stages.lib.rl.trained_policy import TrainedPolicy
from stages.lib.runs.training_run import SavesModels, TrainingRun

SHOWN = ("objective/scores", "objective/kl", "response/eos_rate")


def record_phase(
    this_run: TrainingRun,
    log: RolloutLog,
    iteration: int,
    rollouts: Rollouts,
    kl: torch.Tensor | None,
    row: Mapping[str, float],
) -> None:
    """Add a phase (0-based) to the log and to the curve, show some of both, and say what begins to go wrong.

    `kl` is as `Rollouts.kl` gives it.
    """
    log.append(iteration, rollouts, kl)
    this_run.record(iteration, int(rollouts.response_mask.sum()), row, SHOWN)
    if this_run.curve:
        for seen in new_in([values for _, values in this_run.curve.rows()], iteration + 1):
            this_run.say(f"{this_run.stage}: phase {iteration + 1}: {seen.line}")
    for line in log.samples(rollouts, kl, this_run.runtime.shown_samples):
        this_run.say(line)


class Phased(SavesModels, Protocol):
    """What `keep_policy` reads of a section of params.yaml."""

    @property
    def iterations(self) -> int: ...

    @property
    def model(self) -> str: ...


def keep_policy(this_run: TrainingRun, policy: TrainedPolicy, iteration: int, settings: Phased) -> None:
    """Keep the model folder of a phase (0-based) after its updates, where one is due; the last phase's is published."""
    if iteration + 1 < settings.iterations:
        this_run.keep_model(iteration, policy.engine, policy.lora, settings, tokenizer_from=Path(settings.model))


def tell_of_reward_model(this_run: TrainingRun, reward: Reward) -> None:
    """Say how a reward model that this pipeline did not make is read."""
    for model in reward_models(reward):
        line = model.facts.line() if model.facts else None
        if line:
            this_run.say(f"{this_run.stage}: {line}")


def kept_rewards(this_run: TrainingRun) -> KeptRewards:
    """What rewards have said before in a run of the same code, settings and inputs, from its scratch folder."""
    scratch = this_run.scratch
    if scratch is None:
        return KeptRewards(None, "", this_run.processes)
    return KeptRewards(KeptAnswers(scratch.kept / "rewards.sqlite"), scratch.code, this_run.processes)


def reward_models(reward: Reward) -> Iterator[RewardModel]:
    """The reward models that take part in a reward."""
    rewards = [part.reward for part in reward.by_name.values()] if isinstance(reward, Mixture) else [reward]
    yield from (one for one in rewards if isinstance(one, RewardModel))


def publish_policy(
    this_run: TrainingRun,
    policy: TrainedPolicy,
    log: RolloutLog,
    results: Mapping[str, float],
    *,
    save_dtype: str,
    tokenizer_from: Path,
) -> None:
    """Publish "model", "metrics", "curve" and "rollouts": the averaged weights where the optimizer keeps an average."""
    engine, lora = policy.engine, policy.lora
    with engine.averaged():
        weights = engine.master_weights(policy.language_model)

        def build_others(staged: dict[str, Path]) -> None:
            staged["rollouts"].mkdir()
            if log.path is not None:
                (staged["rollouts"] / "rollouts.jsonl").write_bytes(log.path.read_bytes())
            lora.save_adapter(weights, staged["model"], save_dtype)

        this_run.publish_model(
            policy.language_model,
            this_run.processes.in_main(lambda: lora.merged(weights)) or {},
            {**results, **lora.counts()},
            save_dtype=save_dtype,
            tokenizer_from=tokenizer_from,
            build_others=build_others,
        )
