"""Proximal policy optimization (arXiv 1707.06347) against a reward model, with a critic and a KL penalty.

    r_t = −β KL_t + 1[t = T−1] R(x, y)          KL_t estimated from log π(y_t) − log π_ref(y_t); or in L_π, + β KL_t
    A   = GAE(γ, λ) of r under the critic       (arXiv 1506.02438), whitened over the rollouts of a phase
    L_π = −E[min(ρ A, clip(ρ, 1−ε, 1+ε) A)]      ρ = π(y_t) / π_old(y_t), at the sampling temperature
    L_V = ½ E[max((V − G)², (clip(V, V_old ± ε_v) − G)²)]

Means are over the response tokens of a whole minibatch, and each minibatch is an optimizer step. params.yaml names the
models that policy and critic start from, the reference and the reward model. With LoRA a reference that is the policy's
start is the policy without its adapters, and a reward model that is the critic's start is the critic without its
adapters and with its first head: two models in memory instead of four.

    python -m stages.train_ppo --tokens data/tokens/train/prompts.arrow \\
        --validation data/tokens/validation/prompts.arrow --out models --rollouts data/rollouts \\
        --metrics metrics/training --curve metrics/curves --name ppo
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from stages.lib.command.entries import EntryOption, read_entry
from stages.lib.command.kernels import Kernels
from stages.lib.command.params import read_seed, read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.settings.critic import SharedTrunk
from stages.lib.settings.lora import quantization_of_base
from stages.lib.settings.reward_columns import reward_columns
from stages.lib.settings.reward_functions import reward_files
from stages.lib.settings.runtime import read_runtime
from stages.lib.settings.train_ppo import TrainPpo

if not asks_for_help():
    import torch

    from stages.lib.compute.batching import micro_batching, shared_among
    from stages.lib.compute.engine.base import require_finite
    from stages.lib.compute.processes import Processes, join_processes
    from stages.lib.data.chat import decode_completion
    from stages.lib.data.mapped_table import MappedTable
    from stages.lib.data.token_tables import check_table_fits
    from stages.lib.models.pretrained import Loading, end_and_pad_ids, facts_of
    from stages.lib.objectives.sft import SftObjective
    from stages.lib.rl.advantages import gae
    from stages.lib.rl.collector import Collector
    from stages.lib.rl.early_stop import EarlyStop
    from stages.lib.rl.engine_correction import engine_columns, engine_corrected
    from stages.lib.rl.entropy_bonus import EntropyCoefficient
    from stages.lib.rl.held_out import HeldOutEvaluation, held_out_columns
    from stages.lib.rl.kl_control import new_controller
    from stages.lib.rl.ppo_loss import PpoLoss
    from stages.lib.rl.ppo_updates import Parts, learners, plan_learning_rates, update
    from stages.lib.rl.prompt_table import prompts_of_phase, read_prompts, require_fit
    from stages.lib.rl.ptx import Ptx, read_supervised
    from stages.lib.rl.published_critic import published_critic
    from stages.lib.rl.reference_reset import ResetReference
    from stages.lib.rl.rewards.entry_rewards import load_entry_rewards, part_names, single_reward_model
    from stages.lib.rl.rewards.reward_metrics import reward_metrics
    from stages.lib.rl.rewards.scoring import RewardError
    from stages.lib.rl.rollout_log import RolloutLog
    from stages.lib.rl.rollouts import Rollouts, summary
    from stages.lib.rl.samplers.probe import PROBED
    from stages.lib.rl.samplers.sampler import SamplerError
    from stages.lib.rl.samplers.sampler_choice import SamplerSurroundings, new_sampler
    from stages.lib.rl.score_normalisation import RunningMoments, shape_scores
    from stages.lib.rl.step_back import KlLimit
    from stages.lib.rl.token_rewards import token_rewards, whitened_rewards
    from stages.lib.rl.trained_critic import TrainedCritic, load_critic
    from stages.lib.rl.trained_phase import TrainedPhase
    from stages.lib.rl.trained_policy import load_policy
    from stages.lib.rl.value_loss import explained_variance
    from stages.lib.runs.policy_run import (
        ahead_of_updates,
        end_phase,
        engine_home,
        held_out_evaluation,
        kept_rewards,
        log_phase,
        publish_policy,
        step_back,
        tell_of_reward_model,
    )
    from stages.lib.runs.training_run import TrainingRun

COLUMNS = (
    "objective/scores",
    "objective/kl",
    "objective/rlhf_reward",
    "objective/entropy",
    "objective/kl_coef",
    "response/length",
    "response/eos_rate",
    "value/explained_variance",
    "policy/entropy",
    "policy/loss",
    "policy/clipfrac",
    "policy/approxkl",
    "policy/grad_norm",
    "policy/updates",
    "value/loss",
    "value/clipfrac",
    "value/grad_norm",
    "learning_rate",
    "value/learning_rate",
)


def curve_columns(settings: TrainPpo) -> tuple[str, ...]:
    """Of the curve, with those of what these settings add, and without those of an optimizer that there is not."""
    added = {
        "policy/kl": settings.kl.type == "in_loss",
        "policy/first_ratio": settings.reuse_sampler_logps,
        "objective/entropy_coef": settings.entropy_bonus.type != "none",
        "ptx/loss": settings.ptx is not None,
    }
    absent = ("value/grad_norm", "value/learning_rate") if settings.critic.type == "shared_trunk" else ()
    own = [name for name in COLUMNS if name not in absent]
    own += engine_columns(settings)
    return (*own, *(name for name, is_there in added.items() if is_there))


def load_parts(
    settings: TrainPpo,
    seed: int,
    loading: Loading,
    processes: Processes,
    decode: Callable[[list[int]], str],
    this_run: TrainingRun,
    prompts: MappedTable,
    supervised: MappedTable | None,
) -> Parts:
    """`supervised` are the rows of `ptx`."""
    updates = settings.total_updates
    model, reward_model = Path(settings.model), single_reward_model(settings)
    reference = Path(settings.reference) if settings.reads_reference else None
    launch = (seed, loading, processes)
    of_policy = (settings.lora, settings.policy_optimizer, updates)
    learns, shared = settings.entropy_bonus.type != "none", settings.critic.type == "shared_trunk"
    policy = load_policy(model, reference, *of_policy, *launch, entropy_gradient=learns, value_head=shared)
    batching = micro_batching(loading.runtime, end_and_pad_ids(model)[1], processes)
    if isinstance(settings.critic, SharedTrunk):
        critic = TrainedCritic(None, None, None)
    else:
        folders = (Path(settings.critic.path), reward_model, model)
        of_training = (settings.lora, settings.critic.optimizer, updates, seed, loading)
        critic = load_critic(*folders, settings, *of_training, batching, processes)
    of_sampler = (decode, prompts[:PROBED]["prompt_ids"], this_run.may_stop, engine_home(this_run))
    around = SamplerSurroundings(model, seed, loading, batching, *of_sampler, where=this_run.stage.replace("@", "."))
    sampler = ahead_of_updates(this_run, new_sampler(policy, settings, around), policy, settings, around, prompts)
    of_rewards = (settings, model, settings.max_new_tokens, loading, batching, processes)
    reward = load_entry_rewards(*of_rewards, critic.reward_model, kept_rewards(this_run))
    readers = [*policy.read_beside(model, reference)]
    if critic.engine is not None:
        readers.append(cast(Any, critic.engine.module).classifier)
    sharing = replace(batching, longest_shared=shared_among(loading.runtime, *readers))
    collector = Collector(sampler, reward, policy, critic.engine, sharing)
    return Parts(
        policy.engine,
        critic.engine,
        collector,
        RunningMoments(),
        new_controller(settings.kl),
        EntropyCoefficient(settings.entropy_bonus),
        ResetReference(settings.reference_reset, policy.reference, policy.engine, policy.language_model),
        EarlyStop(),
        KlLimit(settings.max_kl, policy.engine),
        Ptx(supervised, SftObjective(batching), settings.ptx, seed) if supervised and settings.ptx else None,
        published_critic(policy, critic, Path(settings.critic.path)) if settings.critic.publish else None,
    )


def ppo_phases(
    settings: TrainPpo,
    seed: int,
    prompts: MappedTable,
    parts: Parts,
    held_out: HeldOutEvaluation,
    this_run: TrainingRun,
    log: RolloutLog,
) -> None:
    """The phases that are left."""
    trained = TrainedPhase()
    for iteration in this_run.steps(settings.iterations, **parts.state, **held_out.state, trained=trained):
        if trained.row is None and not parts.early_stop.stopped_after:
            trained.begin(*ppo_phase(settings, seed, prompts, parts, iteration, this_run, log))
        # 6. What the policy now answers to validation prompts, whether it goes on, and the next phase's reference.
        if trained.row is not None:
            end_phase(this_run, held_out, trained, parts.early_stop, iteration, settings, parts.kl_limit)
            if parts.reference.after_phase(iteration):
                this_run.say(f"{this_run.stage}: phase {iteration + 1}: the reference is now the policy as it is")


def ppo_phase(
    settings: TrainPpo,
    seed: int,
    prompts: MappedTable,
    parts: Parts,
    iteration: int,
    this_run: TrainingRun,
    log: RolloutLog,
) -> tuple[dict[str, float], int]:
    """A phase (0-based) up to its last update. Returns what was measured, and how many tokens the responses have."""
    # 1. Responses to each prompt of the phase, from the policy as it is, and what all models say of them. Until
    #    that is over, nothing changes that a checkpoint holds.
    asked = prompts_of_phase(prompts, iteration, settings, seed)
    with this_run.keeping_state(RewardError, SamplerError):
        rollouts = parts.collector.collect(asked, iteration, settings.samples_per_prompt)
    this_run.may_stop()
    kl, kl_coef = rollouts.kl(settings.reported_kl), parts.kl_controller.coef
    # 2. Rewards: a penalty for the KL of each token, where it is not in the loss; at the last one the score,
    #    normalised, clipped, and changed where the response does not end.
    if iteration == 0 or settings.normalise_scores != "start":
        parts.moments.update(rollouts.scores)
    scores = shaped_scores(settings, parts.moments, rollouts)
    in_rewards = kl_coef if settings.kl.type == "in_reward" else 0.0
    rewards = token_rewards(kl, scores, rollouts.response_mask, in_rewards)
    whitened = whitened_rewards(rewards, rollouts.response_mask) if settings.whiten_rewards else rewards
    rollouts = rollouts._replace(rewards=whitened)
    # 3. Advantages of the policy's tokens, and the returns that the critic is to foresee.
    advantages, returns = gae(rollouts, settings)
    row = summary(rollouts, kl) | reward_metrics(rollouts) | plan_learning_rates(settings, parts, iteration)
    rollouts, of_engine = engine_corrected(rollouts, settings.engine_correction)
    row |= of_engine | {"objective/kl_coef": kl_coef}
    row["objective/rlhf_reward"] = float(scores.mean()) - kl_coef * row.get("objective/kl", 0.0)
    entropy_coef = parts.entropy.of_phase(row["policy/entropy"])
    if settings.entropy_bonus.type != "none":
        row["objective/entropy_coef"] = entropy_coef
    row["value/explained_variance"] = explained_variance(rollouts.values, returns, rollouts.response_mask)
    require_finite(row["objective/rlhf_reward"], "reward", iteration)
    log_phase(this_run, log, iteration, rollouts, kl, advantages)
    if parts.kl_limit.is_passed(row.get("objective/kl", 0.0)):
        step_back(this_run, parts.early_stop, parts.kl_limit, iteration, row["objective/kl"])
    else:
        parts.kl_limit.keep(iteration)
        # 4. Updates of policy and critic.
        warms_up = iteration < settings.critic_warmup_iterations
        loss = PpoLoss(settings, advantages, returns, kl_coef, entropy_coef)
        row |= update(settings, seed, iteration, *learners(parts, rollouts, loss, warms_up=warms_up))
        # 5. The coefficients of the next phase's KL and entropy.
        parts.kl_controller.update(row.get("objective/kl", 0.0), len(rollouts.episodes))
        parts.entropy.update(row["policy/entropy"])
    return row, int(rollouts.response_mask.sum())


def shaped_scores(settings: TrainPpo, moments: RunningMoments, rollouts: Rollouts) -> torch.Tensor:
    """What each response is rewarded with at its end, (b,)."""
    return shape_scores(
        rollouts.scores,
        rollouts.ended,
        clip=settings.score_clip,
        moments=moments if settings.normalise_scores else None,
        truncated=settings.truncated,
    )


def unscaled_scores(settings: TrainPpo, rollouts: Rollouts) -> torch.Tensor:
    """The same of validation rollouts, which are compared between phases: whatever the moments are by then, (b,)."""
    return shape_scores(rollouts.scores, rollouts.ended, truncated=settings.truncated)


def main(
    tokens: PathOption,
    validation: PathOption,
    out: PathOption,
    rollouts: PathOption,
    metrics: PathOption,
    curve: PathOption,
    name: EntryOption = None,
) -> None:
    """Train a policy on the prompts in TOKENS to please a reward model."""
    name, settings = read_entry("train_ppo", TrainPpo, name)
    seed, trust_remote_code = read_seed(settings), read_value("trust_remote_code", bool)
    runtime, kernels = read_runtime("train_ppo"), read_value("kernels", Kernels)
    processes = join_processes(runtime)
    paths = (settings.model, settings.reference, settings.reward_model, settings.critic.path)
    model, reference = Path(settings.model), Path(settings.reference)
    prompts = read_prompts(tokens, model, reference)
    ptx_tokens = Path(settings.ptx_tokens)
    supervised = read_supervised(ptx_tokens, model) if settings.ptx else None
    outs = {
        "model": out / name,
        "rollouts": rollouts / name,
        "metrics": metrics / f"{name}.json",
        "curve": curve / f"{name}.csv",
    }
    of_settings = {validation: settings.held_out, ptx_tokens: settings.ptx}
    of_rewards = reward_files(settings.rewards, f"train_ppo.{name}.rewards")
    inputs = [tokens, *(path for path, is_read in of_settings.items() if is_read), *map(Path, (*paths, *of_rewards))]
    declared = {f"train_ppo.{name}": settings, "seed": seed, "trust_remote_code": trust_remote_code}
    declared |= {"kernels": kernels}
    columns = curve_columns(settings) + held_out_columns(settings, validation, f"train_ppo.{name}")
    columns += reward_columns(part_names(settings), prompts["source"][:])
    with TrainingRun(f"train_ppo@{name}", declared, inputs, outs, columns, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        quantization, trusted = quantization_of_base(settings.lora), trust_remote_code
        loading = Loading(settings.precision, runtime, processes.device, quantization, trust_remote_code=trusted)
        several = settings.samples_per_prompt > 1
        log = RolloutLog(this_run.log_file("rollouts.jsonl"), model, with_samples=several)
        decode = partial(decode_completion, log.tokenizer)
        parts = load_parts(settings, seed, loading, processes, decode, this_run, prompts, supervised)
        tell_of_reward_model(this_run, parts.collector.reward)
        policy = parts.collector.policy
        require_fit(prompts, tokens, policy.language_model, settings.max_new_tokens, f"train_ppo.{name}")
        if supervised:
            check_table_fits(supervised, facts_of(policy.language_model), ptx_tokens)
        rewards = partial(unscaled_scores, settings)
        held_out = held_out_evaluation(this_run, settings, validation, parts.collector, rewards, settings.max_kl)
        ppo_phases(settings, seed, prompts, parts, held_out, this_run, log)
        stopped = parts.early_stop.stopped_after
        results = {"iterations": stopped or settings.iterations, "stopped_early": int(stopped > 0), **log.results()}
        publish_policy(this_run, held_out, log, results, settings, parts.published_critic)
    processes.leave()


if __name__ == "__main__":
    run(main)
