"""Policy optimisation without a critic: several responses to a prompt, compared with each other (GRPO and its kin).

    A_i = (R_i − mean R) / (s + ε)                    over the samples of a prompt (GRPO, arXiv 2402.03300), or another
    L   = E[−min(ρ A, clip(ρ, 1−low, 1+high) A) + β KL]    ρ = π(y_t) / π_old(y_t); KL an estimate of that to π_ref

R is the reward of a response, less a penalty if it does not end, and less its KL where that is in the reward instead of
the loss. What advantages, loss and KL are is chosen by blocks of params.yaml, which list the papers; the mean of L is
over a whole optimizer step. With LoRA a reference that is the policy's start is the policy without its adapters.

    python -m stages.train_grpo --validation data/tokens/validation/prompts.arrow --out models \\
        --rollouts data/rollouts --metrics metrics/training --curve metrics/curves --name grpo
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from stages.lib.command.entries import EntryOption, read_entry
from stages.lib.command.kernels import Kernels
from stages.lib.command.params import read_seed, read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.settings.lora import quantization_of_base
from stages.lib.settings.reward_columns import reward_columns
from stages.lib.settings.reward_functions import reward_files
from stages.lib.settings.runtime import read_runtime
from stages.lib.settings.train_grpo import TrainGrpo

if not asks_for_help():
    import torch

    from stages.lib.compute.batching import micro_batching
    from stages.lib.compute.engine.base import require_finite
    from stages.lib.compute.processes import join_processes
    from stages.lib.data.chat import decode_completion
    from stages.lib.models.pretrained import Loading, end_and_pad_ids
    from stages.lib.rl.advantages import advantages_of, group_summary
    from stages.lib.rl.collector import Collector
    from stages.lib.rl.dynamic_sampling import GROUP_COLUMNS, GroupSampling
    from stages.lib.rl.early_stop import EarlyStop
    from stages.lib.rl.engine_correction import engine_columns, engine_corrected
    from stages.lib.rl.group_loss import step_loss
    from stages.lib.rl.held_out import HeldOutEvaluation, held_out_columns
    from stages.lib.rl.kl_control import AdaptiveKLController, FixedKLController, new_controller
    from stages.lib.rl.learner import Learner, means_of_updates, minibatches
    from stages.lib.rl.prompt_table import read_prompts, require_fit
    from stages.lib.rl.rewards.entry_rewards import load_entry_rewards, part_names
    from stages.lib.rl.rewards.reward_metrics import reward_metrics
    from stages.lib.rl.rewards.scoring import RewardError
    from stages.lib.rl.rollout_log import RolloutLog
    from stages.lib.rl.rollouts import Rollouts, summary
    from stages.lib.rl.samplers.asynchronous import state_of
    from stages.lib.rl.samplers.probe import PROBED
    from stages.lib.rl.samplers.sampler import SamplerError
    from stages.lib.rl.samplers.sampler_choice import SamplerSurroundings, new_sampler
    from stages.lib.rl.score_normalisation import shape_scores
    from stages.lib.rl.token_masks import without_truncated
    from stages.lib.rl.token_rewards import token_rewards
    from stages.lib.rl.trained_phase import TrainedPhase
    from stages.lib.rl.trained_policy import load_policy
    from stages.lib.runs.policy_run import (
        ahead_of_updates,
        end_phase,
        engine_home,
        held_out_evaluation,
        kept_rewards,
        log_phase,
        publish_policy,
        tell_of_reward_model,
    )
    from stages.lib.runs.training_run import TrainingRun

COLUMNS = ("objective/scores", "objective/rewards", "objective/kl", "objective/entropy", "response/length")
COLUMNS += ("response/eos_rate", "group/distinct", "group/without_variance", "policy/entropy", "policy/loss")
COLUMNS += ("policy/clipfrac", "policy/approxkl", "policy/kl", "policy/grad_norm", "policy/updates")
COLUMNS += ("learning_rate", "objective/kl_coef")


def grpo_phases(
    settings: TrainGrpo,
    seed: int,
    sampling: GroupSampling,
    held_out: HeldOutEvaluation,
    this_run: TrainingRun,
    log: RolloutLog,
) -> EarlyStop:
    """The phases that are left. Returns whether training ended early."""
    collector, controller, early_stop = sampling.collector, new_controller(settings.kl), EarlyStop()
    engine, batching = collector.policy.engine, collector.batching
    state = {"policy": engine, "sampling": collector.sampler.budget, "budget": batching.budget, "prompts": sampling}
    trained = TrainedPhase()
    state |= {"kl_controller": controller, "early_stop": early_stop, "trained": trained}
    for iteration in this_run.steps(settings.iterations, **state, **state_of(collector.sampler), **held_out.state):
        if trained.row is None and not early_stop.stopped_after:
            trained.begin(*grpo_phase(settings, seed, sampling, controller, iteration, this_run, log))
        # 5. What the policy now answers to validation prompts, and whether it goes on.
        if trained.row is not None:
            end_phase(this_run, held_out, trained, early_stop, iteration, settings)
    return early_stop


def grpo_phase(
    settings: TrainGrpo,
    seed: int,
    sampling: GroupSampling,
    controller: AdaptiveKLController | FixedKLController,
    iteration: int,
    this_run: TrainingRun,
    log: RolloutLog,
) -> tuple[dict[str, float], int]:
    """A phase (0-based) up to its last update. Returns what was measured, and how many tokens the responses have."""
    collector = sampling.collector
    engine, batching = collector.policy.engine, collector.batching
    # 1. A group of responses to each prompt of the phase, from the policy as it is, and what all models say of it.
    with this_run.keeping_state(RewardError, SamplerError):
        phase = sampling.phase(iteration)
    rollouts = phase.rollouts
    this_run.may_stop()
    # 2. Rewards: scores, less a penalty for a response that does not end, and for the KL where it is not in the
    #    loss; advantages of responses, most often within their group.
    kl, kl_coef = rollouts.kl(settings.reported_kl), controller.coef
    in_rewards = kl_coef if settings.kl.type == "in_reward" else 0.0
    scores = penalised_scores(settings, rollouts)
    rollouts = rollouts._replace(rewards=token_rewards(kl, scores, rollouts.response_mask, in_rewards))
    advantages = advantages_of(rollouts, settings.advantages, collector.reward_weights)
    row = summary(rollouts, kl) | reward_metrics(rollouts) | group_summary(rollouts)
    require_finite(row["objective/rewards"], "reward", iteration)
    rollouts, of_engine = engine_corrected(rollouts, settings.engine_correction)
    row |= of_engine
    # 3. Updates of the policy: fewer where dynamic sampling has left groups out, so the schedule counts again.
    sampling.count(phase)
    batches = [*minibatches(len(rollouts.episodes) if phase.kept else 0, settings, seed, iteration)]
    later = (settings.iterations - 1 - iteration) * settings.updates_per_iteration
    engine.expect(max(1, len(batches) + later))
    row |= phase.metrics | {"learning_rate": engine.learning_rate, "objective/kl_coef": kl_coef}
    counted = without_truncated(rollouts) if settings.mask_truncated else rollouts
    found = []
    for rows in batches:
        loss = step_loss(settings, kl_coef, counted, advantages, rows)
        found.append(Learner("policy", engine, batching, counted, loss).update(rows))
    row |= means_of_updates(found) | {"policy/updates": float(len(found))}
    # 4. The coefficient of the next phase's KL.
    controller.update(row.get("objective/kl", 0.0), len(rollouts.episodes))
    log_phase(this_run, log, iteration, rollouts, kl, advantages)
    return row, int(rollouts.response_mask.sum())


def penalised_scores(settings: TrainGrpo, rollouts: Rollouts) -> torch.Tensor:
    """What each response is rewarded with, (b,)."""
    return shape_scores(rollouts.scores, rollouts.ended, clip=settings.score_clip, truncated=settings.truncated)


def main(
    validation: PathOption,
    out: PathOption,
    rollouts: PathOption,
    metrics: PathOption,
    curve: PathOption,
    name: EntryOption = None,
) -> None:
    """Train a policy to please its rewards."""
    name, settings = read_entry("train_grpo", TrainGrpo, name)
    seed, trust_remote_code = read_seed(settings), read_value("trust_remote_code", bool)
    runtime, kernels = read_runtime("train_grpo"), read_value("kernels", Kernels)
    processes = join_processes(runtime)
    paths = (settings.model, settings.reference, settings.reward_model)
    model, reference = Path(settings.model), Path(settings.reference)
    tokens = Path(settings.tokens) / "train/prompts.arrow"
    prompts = read_prompts(tokens, model, reference)
    outs = {
        "model": out / name,
        "rollouts": rollouts / name,
        "metrics": metrics / f"{name}.json",
        "curve": curve / f"{name}.csv",
    }
    of_rewards = reward_files(settings.rewards, f"train_grpo.{name}.rewards")
    inputs = [tokens, *([validation] if settings.held_out else []), *map(Path, (*paths, *of_rewards))]
    declared = {f"train_grpo.{name}": settings, "seed": seed, "trust_remote_code": trust_remote_code}
    declared |= {"kernels": kernels}
    columns = COLUMNS + (("policy/left_out",) if settings.off_policy_limit else ())
    columns += GROUP_COLUMNS if settings.dynamic_sampling else ()
    columns += ("policy/first_ratio",) if settings.reuse_sampler_logps else ()
    columns += engine_columns(settings)
    columns += reward_columns(part_names(settings), prompts["source"][:])
    columns += held_out_columns(settings, validation, f"train_grpo.{name}")
    with TrainingRun(f"train_grpo@{name}", declared, inputs, outs, columns, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        quantization, trusted = quantization_of_base(settings.lora), trust_remote_code
        loading = Loading(settings.precision, runtime, processes.device, quantization, trust_remote_code=trusted)
        updates, launch = settings.total_updates, (seed, loading, processes)
        reference = reference if settings.reads_reference else None
        policy = load_policy(model, reference, settings.lora, settings.optimizer, updates, *launch)
        require_fit(prompts, tokens, policy.language_model, settings.max_new_tokens, f"train_grpo.{name}")
        log = RolloutLog(this_run.log_file("rollouts.jsonl"), model, with_samples=True)
        decode = partial(decode_completion, log.tokenizer)
        batching = micro_batching(runtime, end_and_pad_ids(model)[1], processes, *policy.read_beside(model, reference))
        of_sampler = (decode, prompts[:PROBED]["prompt_ids"], this_run.may_stop, engine_home(this_run))
        around = SamplerSurroundings(model, seed, loading, batching, *of_sampler, where=f"train_grpo.{name}")
        sampler = ahead_of_updates(this_run, new_sampler(policy, settings, around), policy, settings, around, prompts)
        of_rewards = (settings, model, settings.max_new_tokens, loading, batching, processes)
        reward = load_entry_rewards(*of_rewards, kept=kept_rewards(this_run))
        tell_of_reward_model(this_run, reward)
        collector = Collector(sampler, reward, policy, None, batching)
        held_out = held_out_evaluation(this_run, settings, validation, collector, partial(penalised_scores, settings))
        sampling = GroupSampling(settings, prompts, collector, seed)
        stopped = grpo_phases(settings, seed, sampling, held_out, this_run, log).stopped_after
        results = {"iterations": stopped or settings.iterations, "stopped_early": int(stopped > 0), **log.results()}
        results |= sampling.results()
        publish_policy(this_run, held_out, log, results, settings)
    processes.leave()


if __name__ == "__main__":
    run(main)
