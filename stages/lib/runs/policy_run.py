"""What an RL stage does at the end of a phase, and what it publishes: policy, adapter if asked for, and rollouts."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import torch

from stages.lib.compute.engine.base import Engine
from stages.lib.data.mapped_table import MappedTable
from stages.lib.data.prompts import Prompt
from stages.lib.rl.collector import Collector
from stages.lib.rl.early_stop import EarlyStop
from stages.lib.rl.held_out import Evaluated, HeldOutEvaluation, held_out_prompts
from stages.lib.rl.prompt_table import prompts_of_phase
from stages.lib.rl.published_critic import PublishedCritic
from stages.lib.rl.rewards.kept_answers import KeptAnswers
from stages.lib.rl.rewards.kept_rewards import KeptRewards
from stages.lib.rl.rewards.mixture import Mixture
from stages.lib.rl.rewards.reward_model import RewardModel
from stages.lib.rl.rewards.scoring import Reward, RewardError
from stages.lib.rl.rollout_log import RolloutLog
from stages.lib.rl.rollouts import Rollouts
from stages.lib.rl.samplers.asynchronous import asynchronous_sampler
from stages.lib.rl.samplers.sampler import Sampler, SamplerError
from stages.lib.rl.samplers.sampler_choice import SamplerSurroundings
from stages.lib.rl.samplers.vllm_sampler import EngineHome
from stages.lib.rl.step_back import KlLimit
from stages.lib.rl.symptoms import new_in
from stages.lib.rl.trained_phase import TrainedPhase
from stages.lib.rl.trained_policy import TrainedPolicy
from stages.lib.runs.training_run import SavesModels, TrainingRun
from stages.lib.settings.train_grpo import TrainGrpo
from stages.lib.settings.train_ppo import TrainPpo

VALIDATION_KL = "validation/objective/kl"
SHOWN = ("objective/scores", "objective/kl", "response/eos_rate")


def log_phase(
    this_run: TrainingRun,
    log: RolloutLog,
    iteration: int,
    rollouts: Rollouts,
    kl: torch.Tensor | None,
    advantages: torch.Tensor,
) -> None:
    """Add the responses of a phase (0-based) to the log, and show some. `kl` is as `Rollouts.kl` gives it."""
    log.append(iteration, rollouts, kl, advantages)
    for line in log.samples(rollouts, kl, this_run.runtime.shown_samples):
        this_run.say(line)


class Phased(SavesModels, Protocol):
    """What `end_phase` reads of a section of params.yaml."""

    @property
    def iterations(self) -> int: ...

    @property
    def model(self) -> str: ...


def held_out_evaluation(
    this_run: TrainingRun,
    settings: Evaluated,
    validation: Path,
    collector: Collector,
    rewards: Callable[[Rollouts], torch.Tensor],
    max_kl: float | None = None,
) -> HeldOutEvaluation:
    """The evaluation of a run's policy on the validation prompts of a token table.

    Args:
        rewards: what responses are rewarded with, (b,), comparable between phases.
        max_kl: as `HeldOutEvaluation` takes it.
    """
    where = this_run.stage.replace("@", ".")
    prompts = held_out_prompts(settings, validation, collector.policy.language_model, where)
    log = RolloutLog(this_run.log_file("held_out.jsonl"), Path(settings.model))
    return HeldOutEvaluation(settings, prompts, collector, rewards, log, max_kl)


def end_phase(
    this_run: TrainingRun,
    held_out: HeldOutEvaluation,
    trained: TrainedPhase,
    early_stop: EarlyStop,
    iteration: int,
    settings: Phased,
    limit: KlLimit | None = None,
) -> None:
    """Evaluate the policy after a phase (0-based) and keep its model folder, where either is due; record the phase.

    The last phase is always evaluated: the one of the plan, the one after which `early_stop` has ended training, or
    the one whose evaluation ends it here. Its model is published, and kept besides only if an earlier one may be.

    Args:
        trained: the phase, which has come to its end then.
        limit: of the KL, which the evaluation measures where no rollouts follow.
    """
    assert trained.row is not None
    planned_end = iteration + 1 == settings.iterations
    with this_run.keeping_state(RewardError, SamplerError, changed=True):
        stands = limit.phases if limit and early_stop.stopped_after else None
        found = held_out.after_phase(iteration, is_last=planned_end or early_stop.stopped_after > 0, stands=stands)
        ends = not early_stop.stopped_after and (planned_end or held_out.patience.is_over)
        if limit and ends and limit.is_passed(found.get(VALIDATION_KL, 0.0)):
            step_back(this_run, early_stop, limit, iteration, found[VALIDATION_KL])
            found = held_out.after_phase(iteration, is_last=True, stands=limit.phases)
    if held_out.patience.is_over and not early_stop.stopped_after:
        early_stop.stopped_after = iteration + 1
        this_run.say(
            f"{this_run.stage}: stops after phase {iteration + 1} of {settings.iterations}: "
            f"validation/{held_out.best.best_by.metric} has not improved in {held_out.patience.misses} evaluations"
        )
    is_last = planned_end or early_stop.stopped_after > 0
    if not is_last or held_out.best.keep == "best":
        policy = held_out.policy
        this_run.keep_model(iteration, policy.engine, policy.lora, settings, tokenizer_from=Path(settings.model))
    this_run.record(iteration, trained.tokens, trained.row | found, SHOWN)
    trained.end()
    if this_run.curve:
        for seen in new_in([values for _, values in this_run.curve.rows()], iteration + 1):
            this_run.say(f"{this_run.stage}: phase {iteration + 1}: {seen.line}")


def step_back(this_run: TrainingRun, early_stop: EarlyStop, limit: KlLimit, iteration: int, kl: float) -> None:
    """End training in a phase (0-based) with the last weights within the limit of the KL."""
    early_stop.stopped_after, stands = iteration + 1, limit.step_back()
    this_run.say(
        f"{this_run.stage}: stops in phase {iteration + 1}: the KL {kl:.3g} is above max_kl {limit.limit}; the weights "
        f"are those after {stands} phases"
    )


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


def engine_home(this_run: TrainingRun) -> EngineHome | None:
    """Where a sampler outside of the stage's processes keeps what is its own; None but in the main process."""
    scratch, folder = this_run.scratch, this_run.runtime.vllm.weights_folder
    if scratch is None:
        return None
    weights = scratch.folder / "vllm" if folder is None else Path(folder) / scratch.folder.name
    return EngineHome(scratch.kept / "responses.sqlite", weights, scratch.code)


def ahead_of_updates(
    this_run: TrainingRun,
    sampler: Sampler,
    policy: TrainedPolicy,
    settings: TrainPpo | TrainGrpo,
    around: SamplerSurroundings,
    prompts: MappedTable,
) -> Sampler:
    """The sampler that an entry asks for, around which responses are drawn a phase ahead if it is `asynchronous`.

    Args:
        prompts: a token table.
    """
    if not settings.asynchronous:
        return sampler

    def upcoming(phase: int) -> list[Prompt]:
        if phase >= settings.iterations:
            return []
        return prompts_of_phase(prompts, phase, settings, around.seed)

    folder = this_run.scratch.folder / "ahead" if this_run.scratch else None
    return asynchronous_sampler(sampler, policy, settings, around, upcoming, lambda: this_run.step, folder)


def reward_models(reward: Reward) -> Iterator[RewardModel]:
    """The reward models that take part in a reward."""
    rewards = [part.reward for part in reward.by_name.values()] if isinstance(reward, Mixture) else [reward]
    yield from (one for one in rewards if isinstance(one, RewardModel))


def publish_policy(
    this_run: TrainingRun,
    held_out: HeldOutEvaluation,
    log: RolloutLog,
    results: Mapping[str, float],
    settings: Phased,
    critic: PublishedCritic | None = None,
) -> None:
    """Publish "model", "metrics", "curve" and "rollouts": the last weights or the best ones that were evaluated.

    Where the optimizer keeps an average, either are averaged weights. A critic goes into the model's folder as it is
    at the end.
    """
    tokenizer_from, save_dtype = Path(settings.model), settings.save_dtype
    policy = held_out.policy
    engine, lora = policy.engine, policy.lora
    logs = {"rollouts": log, **({"held_out": held_out.log} if held_out.settings else {})}
    with engine.averaged(), averaged(critic, engine):
        weights = engine.master_weights(policy.language_model)
        write_critic = critic.writer(tokenizer_from, save_dtype) if critic else None
        kept = held_out.best.choose(lambda: lora.trained(weights))

        def build_others(staged: dict[str, Path]) -> None:
            staged["rollouts"].mkdir()
            for name, responses in logs.items():
                responses.publish(staged["rollouts"] / f"{name}.parquet")
            lora.save_adapter(kept.weights, staged["model"], save_dtype)
            if write_critic:
                write_critic(staged["model"])

        this_run.publish_model(
            policy.language_model,
            this_run.processes.in_main(lambda: lora.merged(weights | kept.weights)) or {},
            {**results, **held_out.results(), **lora.counts()},
            save_dtype=save_dtype,
            tokenizer_from=tokenizer_from,
            build_others=build_others,
        )


def averaged(critic: PublishedCritic | None, policy: Engine) -> AbstractContextManager[None]:
    """`Engine.averaged` of a critic that has an engine of its own."""
    return critic.engine.averaged() if critic and critic.engine is not policy else nullcontext()
