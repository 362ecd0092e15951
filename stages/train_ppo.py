"""Proximal policy optimization (arXiv 1707.06347) against a reward model, with a critic and a KL penalty.

    r_t = −β KL_t + 1[t = T−1] R(x, y)          KL_t estimated from log π(y_t) − log π_SFT(y_t)
    A   = GAE(γ, λ) of r under the critic       (arXiv 1506.02438), whitened over the rollouts of a phase
    L_π = −E[min(ρ A, clip(ρ, 1−ε, 1+ε) A)]      ρ = π(y_t) / π_old(y_t), at the sampling temperature
    L_V = ½ E[max((V − G)², (clip(V, V_old ± ε_v) − G)²)]

Means are over the response tokens of a whole minibatch, and each minibatch is an optimizer step. Policy and reference
start as MODEL, critic and reward model as REWARD_MODEL. With LoRA the reference is the policy without its adapters, and
the reward model the critic without its adapters and with its first head: two models in memory instead of four.

    python -m stages.train_ppo --tokens data/tokens/prompts --model models/sft --reward-model models/rm \\
        --out models/ppo --rollouts data/rollouts/train_ppo --metrics metrics/train_ppo.json \\
        --curve metrics/curves/train_ppo.csv
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stages.lib.command.params import read_params, read_seed, read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.models.tokenizer_files import require_same_tokenizer, require_tokens_of
from stages.lib.settings.lora import quantization_of_base
from stages.lib.settings.runtime import Runtime, read_runtime
from stages.lib.settings.train_ppo import TrainPpo

if not asks_for_help():
    import torch

    from stages.lib.compute.batching import micro_batching, rows_of_step, sampling_budget
    from stages.lib.compute.engine.base import require_finite
    from stages.lib.compute.engine.choice import new_engine
    from stages.lib.compute.frozen_model import frozen
    from stages.lib.compute.processes import Processes, join_processes
    from stages.lib.data.token_tables import PROMPT_SCHEMA, check_table_fits, read_table
    from stages.lib.models.lora import Lora
    from stages.lib.models.pretrained import Loading, end_and_pad_ids, facts_of, load_classifier, load_language_model
    from stages.lib.models.scalar_scores import SequenceScores, TokenScores
    from stages.lib.models.token_logprobs import TokenLogProbs
    from stages.lib.rl.advantages import generalized_advantages, masked_moments, token_rewards, whiten
    from stages.lib.rl.kl_control import AdaptiveKLController, FixedKLController
    from stages.lib.rl.ppo_loss import explained_variance, policy_loss_terms, value_loss_terms
    from stages.lib.rl.rollout_log import RolloutLog
    from stages.lib.rl.rollouts import Rollouts, assemble, score_responses, values_before
    from stages.lib.rl.sampling import require_room, sample_responses
    from stages.lib.rl.score_normalisation import RunningMoments, shape_scores
    from stages.lib.rl.shared_base import FirstHead, WithoutAdapters
    from stages.lib.runs.training_run import TrainingRun

ROLLOUT_METRICS = (
    "objective/scores",
    "objective/kl",
    "objective/rlhf_reward",
    "objective/entropy",
    "objective/kl_coef",
    "response/length",
    "response/eos_rate",
    "value/explained_variance",
)
UPDATE_METRICS = (
    "policy/loss",
    "policy/clipfrac",
    "policy/approxkl",
    "policy/grad_norm",
    "policy/updates",
    "value/loss",
    "value/clipfrac",
    "value/grad_norm",
)
COLUMNS = (*ROLLOUT_METRICS, "policy/entropy", *UPDATE_METRICS, "learning_rate", "value/learning_rate")


class EarlyStop:
    """Whether the policy went further from the SFT policy than `max_kl` allows; part of a checkpoint."""

    def __init__(self) -> None:
        self.stopped_after = 0

    def state_dict(self) -> dict[str, Any]:
        return {"stopped_after": self.stopped_after}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stopped_after = state["stopped_after"]


class Ppo:
    """The models of PPO and what is done with them in a rollout phase and in an update."""

    def __init__(
        self,
        settings: TrainPpo,
        seed: int,
        runtime: Runtime,
        processes: Processes,
        model: Path,
        reward_model: Path,
        *,
        trust_remote_code: bool,
    ) -> None:
        self.settings, self.seed, self.runtime, self.processes = settings, seed, runtime, processes
        self.eos_id, self.pad_id = end_and_pad_ids(model)
        quantization = quantization_of_base(settings.lora)
        loading = Loading(
            settings.precision, runtime, processes.device, quantization, trust_remote_code=trust_remote_code
        )
        launch = (runtime, processes)
        self.language_model = load_language_model(model, loading)
        self.lora = Lora(self.language_model, settings.lora, seed, model)
        log_probs = {"temperature": settings.temperature, "chunk_tokens": runtime.logits_chunk_tokens}
        updates = settings.updates_per_iteration
        self.policy = new_engine(
            TokenLogProbs(self.language_model, with_entropies=True, **log_probs),
            settings.policy_optimizer,
            (settings.iterations - settings.critic_warmup_iterations) * updates,
            *launch,
        )
        classifier = load_classifier(reward_model, loading)
        critic_lora = Lora(classifier, settings.lora, seed, reward_model)
        # Under ZeRO 3 weights can only be read through the engine that shards them, which knows no second head.
        shares_body = settings.lora is not None and runtime.zero_stage < 3
        first_head = FirstHead(classifier) if shares_body else None
        critic_updates = settings.iterations * updates
        self.critic = new_engine(TokenScores(classifier), settings.critic_optimizer, critic_updates, *launch)
        if settings.lora:
            self.reference = WithoutAdapters(self.policy, self.lora)
        else:
            reference = load_language_model(model, replace(loading, frozen=True))
            self.reference = frozen(TokenLogProbs(reference, **log_probs), *launch)
        if first_head:
            self.reward_model = WithoutAdapters(SequenceScores(first_head), critic_lora)
        else:
            frozen_classifier = load_classifier(reward_model, replace(loading, frozen=True))
            self.reward_model = frozen(SequenceScores(frozen_classifier), *launch)
        self.batching = micro_batching(runtime, self.pad_id, processes)
        self.sampling = sampling_budget(runtime)
        self.moments = RunningMoments()
        self.kl_controller = (
            AdaptiveKLController(settings.kl_coef, settings.kl_target, settings.kl_horizon)
            if settings.kl_controller == "adaptive"
            else FixedKLController(settings.kl_coef)
        )
        self.early_stop = EarlyStop()

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: each part with state_dict() and load_state_dict()."""
        parts = ("policy", "critic", "moments", "kl_controller", "early_stop", "sampling")
        return {name: getattr(self, name) for name in parts} | {"budget": self.batching.budget}

    def collect(self, prompts: list[list[int]], iteration: int, may_stop: Callable[[], None]) -> Rollouts:
        """Sample a response to each prompt and have all models judge it. The same in every process.

        `may_stop` is called where a phase can be left: until it is over, nothing that a checkpoint holds changes.
        """
        self.language_model.eval()
        responses = self.sampling.attempt(
            lambda: sample_responses(
                self.policy,
                prompts,
                range(len(prompts)),
                config=self.language_model.config,
                seed=self.seed,
                step=iteration,
                temperature=self.settings.temperature,
                max_new_tokens=self.settings.max_new_tokens,
                eos_id=self.eos_id,
                pad_id=self.pad_id,
                batch_size=self.sampling.size,
                processes=self.processes,
                after_batch=may_stop,
            )
        )
        self.language_model.train()
        scored = score_responses(
            prompts,
            responses,
            policy=self.policy,
            reference=self.reference,
            critic=self.critic,
            reward_model=self.reward_model,
            batching=self.batching,
        )
        may_stop()
        return assemble(
            prompts,
            responses,
            scored,
            kl_estimator=self.settings.kl_estimator,
            eos_id=self.eos_id,
            device=self.processes.device,
        )

    def learn(self, rollouts: Rollouts, iteration: int) -> dict[str, float]:
        """All updates of a phase, or none if the policy is too far from the SFT policy. Returns a row of the curve."""
        advantages, returns, shaped = self.advantages(rollouts)
        row = summarise_rollouts(rollouts, shaped, returns, self.kl_controller.coef)
        require_finite(row["objective/rlhf_reward"], "reward", iteration)
        row |= {"learning_rate": self.policy.learning_rate, "value/learning_rate": self.critic.learning_rate}
        if self.settings.max_kl is not None and row["objective/kl"] > self.settings.max_kl:
            self.early_stop.stopped_after = iteration + 1
            return row
        row |= self.update(rollouts, advantages, returns, iteration)
        self.kl_controller.update(row["objective/kl"], len(rollouts.prompts))
        return row

    def advantages(self, rollouts: Rollouts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(advantages, returns), each (b, t), and the shaped score of each response (b,)."""
        settings = self.settings
        self.moments.update(rollouts.scores)
        shaped = shape_scores(
            rollouts.scores,
            rollouts.ended,
            clip=settings.score_clip,
            moments=self.moments if settings.normalise_scores else None,
            missing_eos_penalty=settings.missing_eos_penalty,
        )
        mask = rollouts.response_mask
        rewards = token_rewards(rollouts.kl, shaped, mask, self.kl_controller.coef)
        advantages, returns = generalized_advantages(rewards, rollouts.values, mask, settings.gamma, settings.lam)
        if settings.whiten_advantages:
            total, squares, count = masked_moments(advantages, mask)
            mean = total / count
            advantages = whiten(advantages, mask, mean, squares / count - mean * mean)
        return advantages, returns, shaped

    def update(self, rollouts: Rollouts, advantages: torch.Tensor, returns: torch.Tensor, iteration: int) -> dict:
        """All minibatch updates of a phase. Returns the means of UPDATE_METRICS over its tokens."""
        settings = self.settings
        train_policy = iteration >= settings.critic_warmup_iterations
        totals: dict[str, list[float]] = {name: [] for name in UPDATE_METRICS}
        for epoch in range(settings.epochs):
            key = [self.seed, (iteration << 32) + epoch]
            order = np.random.Generator(np.random.Philox(key=key)).permutation(len(rollouts.prompts))
            for start in range(0, len(order), settings.minibatch_size):
                rows = [int(row) for row in order[start : start + settings.minibatch_size]]
                minibatch = (rows, rollouts, advantages, returns)
                if settings.max_policy_kl is not None:
                    before = self._accumulate(*minibatch, train_policy=False, train_critic=False)
                    if before["policy/approxkl"] > settings.max_policy_kl:
                        return self._update_means(totals)
                sums = self._accumulate(*minibatch, train_policy=train_policy)
                for name, value in sums.items():
                    totals[name].append(value)
                require_finite(sums["policy/loss"] + sums["value/loss"], "loss", self.critic.steps_taken)
                if train_policy:
                    totals["policy/grad_norm"].append(self.policy.step())
                totals["value/grad_norm"].append(self.critic.step())
        return self._update_means(totals)

    @staticmethod
    def _update_means(totals: dict[str, list[float]]) -> dict[str, float]:
        means = {name: sum(values) / len(values) for name, values in totals.items() if values}
        return means | {"policy/updates": float(len(totals["policy/grad_norm"]))}

    def _accumulate(
        self,
        rows: list[int],
        rollouts: Rollouts,
        advantages: torch.Tensor,
        returns: torch.Tensor,
        *,
        train_policy: bool,
        train_critic: bool = True,
    ) -> dict[str, float]:
        """Gradients of one minibatch, from this process's part of it; means over all its tokens."""
        tokens = int(rollouts.response_mask[rows].sum())
        passes = partial(self._own_passes, rows, rollouts, advantages, returns, tokens, train_policy, train_critic)
        sums = self.batching.budget.attempt(passes, self.policy, self.critic)
        names = ("policy/loss", "policy/clipfrac", "policy/approxkl", "value/loss", "value/clipfrac")
        return dict(zip(names, (total / tokens for total in self.processes.sum(sums.tolist())), strict=True))

    def _own_passes(
        self,
        rows: list[int],
        rollouts: Rollouts,
        advantages: torch.Tensor,
        returns: torch.Tensor,
        tokens: int,
        train_policy: bool,
        train_critic: bool,
    ) -> torch.Tensor:
        """The sums over this process's passes; `tokens` is the denominator of the gradients."""
        width = rollouts.response_mask.shape[1]
        sums = torch.zeros(5, dtype=torch.float64)
        columns = ([rollouts.prompts[row] for row in rows], [rollouts.responses[row] for row in rows])
        for batch in self.batching.sequences(*columns):
            places = [rows[row] for row in batch.rows]
            mask = rollouts.response_mask[places]
            with torch.set_grad_enabled(train_policy):
                logps, _ = self.policy(*batch.inputs, batch.completion_mask)
                policy = policy_loss_terms(
                    batch.on_completions(logps, width),
                    rollouts.logps[places],
                    advantages[places],
                    mask,
                    self.settings.clip_range,
                )
                if train_policy:
                    self.policy.backward(policy.loss_sum / tokens)
            with torch.set_grad_enabled(train_critic):
                values = batch.on_completions(values_before(self.critic, batch), width)
                value = value_loss_terms(
                    values, rollouts.values[places], returns[places], mask, self.settings.value_clip_range
                )
                if train_critic:
                    self.critic.backward(value.loss_sum / tokens)
            parts = (policy.loss_sum, policy.clipped_sum, policy.approx_kl_sum, value.loss_sum, value.clipped_sum)
            sums += torch.stack([part.detach().double().cpu() for part in parts])
        return sums


def main(
    tokens: PathOption,
    model: PathOption,
    reward_model: PathOption,
    out: PathOption,
    rollouts: PathOption,
    metrics: PathOption,
    curve: PathOption,
) -> None:
    """Train MODEL on the prompts in TOKENS to please REWARD_MODEL."""
    settings = read_params("train_ppo", TrainPpo)
    seed = read_seed(settings)
    trust_remote_code = read_value("trust_remote_code", bool)
    runtime = read_runtime("train_ppo")
    processes = join_processes(runtime)
    require_same_tokenizer(model, reward_model)
    require_tokens_of(tokens / "train.arrow", model)
    table = read_table(tokens / "train.arrow", PROMPT_SCHEMA)
    outs = {"model": out, "rollouts": rollouts, "metrics": metrics, "curve": curve}
    inputs = [tokens / "train.arrow", model, reward_model]
    declared = {"train_ppo": settings, "seed": seed, "trust_remote_code": trust_remote_code}
    with TrainingRun("train_ppo", declared, inputs, outs, COLUMNS, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        ppo = Ppo(settings, seed, runtime, processes, model, reward_model, trust_remote_code=trust_remote_code)
        check_table_fits(table, facts_of(ppo.language_model), tokens / "train.arrow")
        where = f"{tokens / 'train.arrow'} with train_ppo.max_new_tokens"
        require_room(table["prompt_ids"], ppo.language_model.config, settings.max_new_tokens, where)
        log = RolloutLog(this_run.log_file("rollouts.jsonl"), model)
        passes = settings.iterations * settings.rollout_batch_size / len(table)
        for iteration in this_run.steps(settings.iterations, **ppo.state):
            if ppo.early_stop.stopped_after:
                continue
            rows = rows_of_step(iteration, len(table), settings.rollout_batch_size, math.ceil(passes), seed)
            batch = ppo.collect(table[rows]["prompt_ids"], iteration, this_run.may_stop)
            row = ppo.learn(batch, iteration)
            if ppo.early_stop.stopped_after:
                this_run.say(f"train_ppo: stops, KL {row['objective/kl']:.3g} is above max_kl {settings.max_kl}")
            log.append(iteration, [table["row"][index] for index in rows], batch)
            response_tokens = int(batch.response_mask.sum())
            this_run.record(iteration, response_tokens, row, ("objective/scores", "objective/kl", "response/eos_rate"))
            for line in log.samples(batch, runtime.shown_samples):
                this_run.say(line)
        results = {
            "iterations": ppo.early_stop.stopped_after or settings.iterations,
            "stopped_early": int(ppo.early_stop.stopped_after > 0),
            **log.results(),
        }
        with ppo.policy.averaged():
            weights = ppo.policy.master_weights(ppo.language_model)

            def build_others(staged: dict[str, Path]) -> None:
                staged["rollouts"].mkdir()
                (staged["rollouts"] / "rollouts.jsonl").write_bytes(log.path.read_bytes())
                ppo.lora.save_adapter(weights, staged["model"], settings.save_dtype)

            this_run.publish_model(
                ppo.language_model,
                processes.in_main(lambda: ppo.lora.merged(weights)),
                results | ppo.lora.counts(),
                save_dtype=settings.save_dtype,
                tokenizer_from=model,
                build_others=build_others,
            )
    processes.leave()


def summarise_rollouts(
    batch: Rollouts, shaped: torch.Tensor, returns: torch.Tensor, kl_coef: float
) -> dict[str, float]:
    """ROLLOUT_METRICS of one phase: means over its responses, entropy over its tokens. KL is summed over a response."""
    kl = float(batch.kl.sum(dim=-1).mean())
    entropy = float(batch.entropies.sum() / batch.response_mask.sum())
    return {
        "objective/scores": float(batch.scores.mean()),
        "objective/kl": kl,
        "objective/rlhf_reward": float(shaped.mean()) - kl_coef * kl,
        "objective/entropy": float(batch.entropies.sum(dim=-1).mean()),
        "objective/kl_coef": kl_coef,
        "response/length": float(batch.response_mask.sum(dim=-1).float().mean()),
        "response/eos_rate": float(batch.ended.float().mean()),
        "value/explained_variance": explained_variance(batch.values, returns, batch.response_mask),
        "policy/entropy": entropy,
    }


if __name__ == "__main__":
    run(main)
