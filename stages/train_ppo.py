"""Proximal policy optimization (arXiv 1707.06347) against a reward model, with a critic and a KL penalty.

    r_t = −β KL_t + 1[t = T−1] R(x, y)          KL_t estimated from log π(y_t) − log π_ref(y_t)
    A   = GAE(γ, λ) of r under the critic       (arXiv 1506.02438), whitened over the rollouts of a phase
    L_π = −E[min(ρ A, clip(ρ, 1−ε, 1+ε) A)]      ρ = π(y_t) / π_old(y_t), at the sampling temperature
    L_V = ½ E[max((V − G)², (clip(V, V_old ± ε_v) − G)²)]

Means are over the response tokens of a whole minibatch, and each minibatch is an optimizer step. params.yaml names the
models that policy and critic start from, the reference and the reward model. With LoRA a reference that is the policy's
start is the policy without its adapters, and a reward model that is the critic's start is the critic without its
adapters and with its first head: two models in memory instead of four.

    python -m stages.train_ppo --tokens data/tokens/train/prompts.arrow --out models --rollouts data/rollouts \\
        --metrics metrics/training --curve metrics/curves --name ppo
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from stages.lib.command.entries import EntryOption, read_entry
from stages.lib.command.kernels import Kernels
from stages.lib.command.params import read_seed, read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.settings.lora import quantization_of_base
from stages.lib.settings.reward_functions import reward_files
from stages.lib.settings.runtime import read_runtime
from stages.lib.settings.train_ppo import TrainPpo

if not asks_for_help():
    import torch

    from stages.lib.compute.batching import micro_batching
    from stages.lib.compute.engine.base import Engine, require_finite
    from stages.lib.compute.processes import Processes, join_processes
    from stages.lib.data.chat import decode_completion
    from stages.lib.data.mapped_table import MappedTable
    from stages.lib.models.pretrained import Loading, end_and_pad_ids
    from stages.lib.rl.advantages import gae
    from stages.lib.rl.collector import Collector
    from stages.lib.rl.early_stop import EarlyStop
    from stages.lib.rl.kl_control import AdaptiveKLController, FixedKLController, new_controller
    from stages.lib.rl.learner import Learner, Pass, TokenSums, mean_of_each, minibatches
    from stages.lib.rl.policy_losses import POLICY_LOSSES
    from stages.lib.rl.prompt_table import prompts_of_phase, read_prompts, require_fit
    from stages.lib.rl.rewards.entry_rewards import load_entry_rewards, part_names, single_reward_model
    from stages.lib.rl.rewards.reward_metrics import reward_columns, reward_metrics
    from stages.lib.rl.rollout_log import RolloutLog
    from stages.lib.rl.rollouts import Rollouts, summary, values_before
    from stages.lib.rl.score_normalisation import RunningMoments, shape_scores
    from stages.lib.rl.token_rewards import token_rewards
    from stages.lib.rl.trained_critic import load_critic
    from stages.lib.rl.trained_policy import load_policy, own_sampler
    from stages.lib.rl.value_loss import explained_variance, value_loss_terms
    from stages.lib.runs.policy_run import keep_policy, publish_policy, record_phase, tell_of_reward_model
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


class Parts(NamedTuple):
    """What a phase is made with."""

    policy: Engine
    critic: Engine
    collector: Collector
    moments: RunningMoments
    kl_controller: AdaptiveKLController | FixedKLController
    early_stop: EarlyStop

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: each part with state_dict() and load_state_dict()."""
        budgets = {"sampling": self.collector.sampler.budget, "budget": self.collector.batching.budget}
        return {name: part for name, part in self._asdict().items() if name != "collector"} | budgets


def load_parts(
    settings: TrainPpo,
    seed: int,
    loading: Loading,
    processes: Processes,
    decode: Callable[[list[int]], str],
    may_stop: Callable[[], None],
) -> Parts:
    """`may_stop` is called between two batches of sampling."""
    updates, phases = settings.updates_per_iteration, settings.iterations
    of_policy, of_critic = (phases - settings.critic_warmup_iterations) * updates, phases * updates
    model, reward_model = Path(settings.model), single_reward_model(settings)
    launch = (seed, loading, processes)
    policy = load_policy(model, Path(settings.reference), settings.lora, settings.policy_optimizer, of_policy, *launch)
    batching = micro_batching(loading.runtime, end_and_pad_ids(model)[1], processes)
    folders = (Path(settings.critic), reward_model, model)
    of_training = (settings.lora, settings.critic_optimizer, of_critic, seed, loading)
    critic = load_critic(*folders, settings, *of_training, batching, processes)
    sampler = own_sampler(policy, model, settings, seed, loading.runtime, processes, decode, may_stop)
    of_rewards = (settings, model, settings.max_new_tokens, loading, batching, processes)
    reward = load_entry_rewards(*of_rewards, critic.reward_model)
    collector = Collector(sampler, reward, policy, critic.engine, batching)
    controller = new_controller(settings.kl_controller)
    return Parts(policy.engine, critic.engine, collector, RunningMoments(), controller, EarlyStop())


def ppo_phases(
    settings: TrainPpo, seed: int, prompts: MappedTable, parts: Parts, this_run: TrainingRun, log: RolloutLog
) -> None:
    """The phases that are left."""
    for iteration in this_run.steps(settings.iterations, **parts.state):
        if parts.early_stop.stopped_after:
            continue
        # 1. A response to each prompt of the phase, from the policy as it is, and what all models say of it. Until that
        #    is over, nothing changes that a checkpoint holds.
        rollouts = parts.collector.collect(prompts_of_phase(prompts, iteration, settings, seed), iteration)
        this_run.may_stop()
        kl, kl_coef = rollouts.kl(settings.kl_estimator), parts.kl_controller.coef
        # 2. Rewards: a penalty for the KL of each token; at the last one the score, normalised and clipped, less a
        #    penalty for a response that does not end.
        parts.moments.update(rollouts.scores)
        scores = shaped_scores(settings, parts.moments, rollouts)
        rollouts = rollouts._replace(rewards=token_rewards(kl, scores, rollouts.response_mask, kl_coef))
        # 3. Advantages of the policy's tokens, and the returns that the critic is to foresee.
        advantages, returns = gae(rollouts, settings)
        row = (
            summary(rollouts, kl)
            | reward_metrics(rollouts)
            | plan_learning_rates(settings, parts, iteration)
            | {"objective/kl_coef": kl_coef}
        )
        row["objective/rlhf_reward"] = float(scores.mean()) - kl_coef * row["objective/kl"]
        row["value/explained_variance"] = explained_variance(rollouts.values, returns, rollouts.response_mask)
        require_finite(row["objective/rlhf_reward"], "reward", iteration)
        if settings.max_kl is not None and row["objective/kl"] > settings.max_kl:
            parts.early_stop.stopped_after = iteration + 1
            this_run.say(f"{this_run.stage}: stops, KL {row['objective/kl']:.3g} is above max_kl {settings.max_kl}")
        else:
            # 4. Updates of policy and critic.
            row |= update(settings, seed, iteration, *learners(settings, parts, rollouts, advantages, returns))
            # 5. The coefficient of the next phase's KL.
            parts.kl_controller.update(row["objective/kl"], len(rollouts.episodes))
            keep_policy(this_run, parts.collector.policy, iteration, settings)
        record_phase(this_run, log, iteration, rollouts, kl, row)


def shaped_scores(settings: TrainPpo, moments: RunningMoments, rollouts: Rollouts) -> torch.Tensor:
    """What each response is rewarded with at its end, (b,)."""
    return shape_scores(
        rollouts.scores,
        rollouts.ended,
        clip=settings.score_clip,
        moments=moments if settings.normalise_scores else None,
        missing_eos_penalty=settings.missing_eos_penalty,
    )


def plan_learning_rates(settings: TrainPpo, parts: Parts, iteration: int) -> dict[str, float]:
    """Let both end with the last phase, however many updates there have been. Returns those of the first updates."""
    updates, warmup = settings.updates_per_iteration, settings.critic_warmup_iterations
    parts.policy.expect((settings.iterations - max(iteration, warmup)) * updates)
    parts.critic.expect((settings.iterations - iteration) * updates)
    rates = (parts.policy.learning_rate, parts.critic.learning_rate)
    return dict(zip(("learning_rate", "value/learning_rate"), rates, strict=True))


def learners(
    settings: TrainPpo, parts: Parts, rollouts: Rollouts, advantages: torch.Tensor, returns: torch.Tensor
) -> tuple[Learner, Learner]:
    """Of policy and critic."""
    on_policy, on_critic = partial(policy_loss, settings, advantages), partial(value_loss, settings, returns)
    policy = Learner("policy", parts.policy, parts.collector.batching, rollouts, on_policy)
    return policy, Learner("value", parts.critic, parts.collector.batching, rollouts, on_critic)


def update(settings: TrainPpo, seed: int, iteration: int, policy: Learner, critic: Learner) -> dict[str, float]:
    """Every minibatch of a phase. Returns means over them."""
    found: list[dict[str, float]] = []
    for rows in minibatches(len(policy.rollouts.episodes), settings, seed, iteration):
        limit = settings.max_policy_kl
        if limit is not None and policy.measure(rows)["policy/approxkl"] > limit:
            break
        of_policy = policy.update(rows) if iteration >= settings.critic_warmup_iterations else {}
        found.append(of_policy | critic.update(rows))
    updates = sum("policy/grad_norm" in means for means in found)
    return mean_of_each(found) | {"policy/updates": float(updates)}


def policy_loss(settings: TrainPpo, advantages: torch.Tensor, rollouts: Rollouts, one: Pass) -> TokenSums:
    """L_π, and how far the policy is from the one that sampled."""
    mask = rollouts.response_mask[one.rows]
    logps = one.engine(*one.batch.inputs, one.batch.completion_mask, settings.temperature).logps
    logps = one.batch.on_completions(logps, mask.shape[1])
    terms = POLICY_LOSSES["clip"](logps, rollouts.logps[one.rows], advantages[one.rows], mask, settings)
    return {"loss": terms.loss_sum, "clipfrac": terms.clipped_sum, "approxkl": terms.approx_kl_sum}


def value_loss(settings: TrainPpo, returns: torch.Tensor, rollouts: Rollouts, one: Pass) -> TokenSums:
    """L_V."""
    mask = rollouts.response_mask[one.rows]
    values = one.batch.on_completions(values_before(one.engine, one.batch), mask.shape[1])
    terms = value_loss_terms(values, rollouts.values[one.rows], returns[one.rows], mask, settings.value_clip_range)
    return {"loss": terms.loss_sum, "clipfrac": terms.clipped_sum}


def main(
    tokens: PathOption,
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
    paths = (settings.model, settings.reference, settings.reward_model, settings.critic)
    model, reference = Path(settings.model), Path(settings.reference)
    prompts = read_prompts(tokens, model, reference)
    outs = {
        "model": out / name,
        "rollouts": rollouts / name,
        "metrics": metrics / f"{name}.json",
        "curve": curve / f"{name}.csv",
    }
    inputs = [tokens, *map(Path, (*paths, *reward_files(settings.rewards, f"train_ppo.{name}.rewards")))]
    declared = {f"train_ppo.{name}": settings, "seed": seed, "trust_remote_code": trust_remote_code}
    declared |= {"kernels": kernels}
    columns = COLUMNS + reward_columns(part_names(settings), prompts["source"][:])
    with TrainingRun(f"train_ppo@{name}", declared, inputs, outs, columns, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        quantization, trusted = quantization_of_base(settings.lora), trust_remote_code
        loading = Loading(settings.precision, runtime, processes.device, quantization, trust_remote_code=trusted)
        log = RolloutLog(this_run.log_file("rollouts.jsonl"), model)
        decode = partial(decode_completion, log.tokenizer)
        parts = load_parts(settings, seed, loading, processes, decode, this_run.may_stop)
        tell_of_reward_model(this_run, parts.collector.reward)
        policy = parts.collector.policy
        require_fit(prompts, tokens, policy.language_model, settings.max_new_tokens, f"train_ppo.{name}")
        ppo_phases(settings, seed, prompts, parts, this_run, log)
        stopped = parts.early_stop.stopped_after
        results = {"iterations": stopped or settings.iterations, "stopped_early": int(stopped > 0), **log.results()}
        publish_policy(this_run, policy, log, results, save_dtype=settings.save_dtype, tokenizer_from=model)
    processes.leave()


if __name__ == "__main__":
    run(main)
