"""Direct preference optimization (arXiv 2305.18290) from cached reference log-probs; no reference model in memory.

    L = Σ_k w_k Σ_i loss_k(Δ_c,i, Δ_r,i) / n,    by default −log σ(β (Δ_c − Δ_r))

with Δ = log π(y|x) − log π_ref(y|x) summed over completion tokens; n counts all pairs of the optimizer step. The losses
are in lib/objectives/preference_losses.py; SimPO, CPO, ORPO and cross-entropy need no reference.

The model that it starts from and the reference's log-probs are named in params.yaml. Where the reference is that model,
Δ is 0 before the first step, and this is checked; of another reference h = Δ_c − Δ_r is printed as it is. A loss
without a reference has the model itself in its place.

    python -m stages.train_dpo --out models --metrics metrics/training --curve metrics/curves --name dpo
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.lib.command.entries import EntryOption, read_entry
from stages.lib.command.errors import StageError
from stages.lib.command.kernels import Kernels
from stages.lib.command.params import read_seed, read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.models.tokenizer_files import require_tokens_of
from stages.lib.settings.lora import quantization_of_base
from stages.lib.settings.preference_loss import needs_reference, needs_tokens_of_reference
from stages.lib.settings.runtime import read_runtime
from stages.lib.settings.train_dpo import TrainDpo

if TYPE_CHECKING:
    import torch

if not asks_for_help():
    import numpy as np

    from stages.lib.compute.batching import MicroBatching, micro_batching, rows_of_step, steps_in
    from stages.lib.compute.engine.base import Engine
    from stages.lib.compute.engine.choice import new_engine
    from stages.lib.compute.processes import join_processes
    from stages.lib.data.reference_tables import (
        LOG_PROBS,
        MODEL_PATH,
        read_reference,
        require_computed_alike,
        require_made_from,
    )
    from stages.lib.data.token_tables import PREFERENCE_SCHEMA, check_table_fits, read_note, read_table
    from stages.lib.models.lora import Lora
    from stages.lib.models.pretrained import Loading, end_and_pad_ids, facts_of, load_language_model
    from stages.lib.models.token_logprobs import TokenLogProbs
    from stages.lib.objectives.fit import fit
    from stages.lib.objectives.live_reference import LivePairs, LiveReference
    from stages.lib.objectives.preference import PreferenceObjective, first_values, metrics_of_loss
    from stages.lib.objectives.reference_start import mean_chosen_logp, mean_margin, require_start
    from stages.lib.objectives.router_loss import router_columns, with_router_loss
    from stages.lib.runs.model_card import shareable_path
    from stages.lib.runs.publish_kept import publish_kept
    from stages.lib.runs.shown_replies import shown_replies
    from stages.lib.runs.training_run import TrainingRun

SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "validation/loss")


class Pairs:
    """Preference tokens joined with the reference log-probs of the same rows.

    Args:
        path: of the log-probs; None for a loss without a reference.
        per_token_for: what needs the reference's log-probs of single tokens, in words, if anything does.
    """

    def __init__(self, tokens: Path, path: Path | None, per_token_for: str | None = None) -> None:
        self.tokens_path, self.path = tokens, path
        self.tokens = read_table(tokens, PREFERENCE_SCHEMA)
        self.reference = read_reference(path, self.tokens, tokens, per_token_for=per_token_for) if path else None

    def starts_as_reference(self, model: Path) -> bool:
        """Whether the reference is, by its path, the model that the policy starts from."""
        return self.path is not None and read_note(self.path, MODEL_PATH) == shareable_path(str(model))

    def require_agreement(self, settings: TrainDpo, where: str) -> None:
        """Raise StageError if tokens or reference are not of the model of the start, before its first step."""
        model = Path(settings.model)
        require_tokens_of(self.tokens_path, model)
        if self.path is not None and self.starts_as_reference(model):
            require_computed_alike(self.path, settings.precision, quantization_of_base(settings.lora), where)

    def require_made_from_inputs(self, model: Path, this_run: TrainingRun) -> None:
        """Raise StageError if the reference is of other tokens, or of other weights of the model of the start."""
        if self.path is None:
            return
        hashes = this_run.own_scratch.input_hashes
        inputs = {"tokens": self.tokens_path} | ({"model": model} if self.starts_as_reference(model) else {})
        require_made_from(self.path, **{note: (path, hashes[str(path)]) for note, path in inputs.items()})

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> dict[str, list]:
        return {**self.tokens[rows], **(self.reference[rows] if self.reference else {})}


def tell_start(
    this_run: TrainingRun, policy: Engine, pairs: Pairs, rows: Any, batching: MicroBatching, settings: TrainDpo
) -> None:
    """Say how far the policy is from its reference on some rows. Raises StageError if it should be that and is not."""
    if pairs.path is None:
        return
    if pairs.starts_as_reference(Path(settings.model)):
        require_start(policy, pairs[rows], batching, pairs.path, settings.precision)
    else:
        h = mean_margin(policy, pairs[rows], batching)
        this_run.say(f"{this_run.stage}: mean |h| to the reference of {pairs.path} is {h:.4g} nats at the start")


def chosen_at_start(policy: Engine, pairs: Pairs, batching: MicroBatching, model: Path) -> float:
    """The mean log-prob of a chosen reply under the policy as it starts, in nats."""
    if pairs.reference is not None and pairs.starts_as_reference(model):
        return float(np.mean(pairs.reference[LOG_PROBS[0]][:]))
    return mean_chosen_logp(policy, pairs[:], batching)


def told_first_losses(firsts: Mapping[str, float]) -> str:
    """What is known of the first loss of a policy that is its reference, or nothing."""
    told = ", ".join(f"{name} {value:.4f}" for name, value in firsts.items())
    return f"; the loss of a policy that is its reference is {told}" if told else ""


def told_displacement(nats: float) -> str:
    """A warning if the log-prob of a chosen reply has changed by less than 0 nats since the start."""
    if nats >= 0:
        return ""
    return (
        f"warning: the log-prob of a chosen validation reply fell by {-nats:.4g} nats on average (displacement); a "
        "mixture with sft holds it up"
    )


def live_reference(
    this_run: TrainingRun,
    settings: TrainDpo,
    loading: Loading,
    policy: Engine,
    policy_weights: Callable[[], dict[str, torch.Tensor]],
    batching: MicroBatching,
    pairs: Pairs,
    steps: int,
) -> LiveReference | None:
    """A reference that follows the policy, if settings ask for it.

    Args:
        policy_weights: as `LiveReference` takes them.
    Raises:
        StageError: the policy does not start as its reference.
    """
    sync, model = settings.reference_sync, Path(settings.model)
    if sync is None:
        return None
    where = f"params.yaml: {this_run.stage.replace('@', '.')}.reference_sync"
    if not pairs.starts_as_reference(model):
        raise StageError(
            f"{where}: the reference of {pairs.path} is not {model}, so it cannot move from there; set null"
        )
    if sync.every < steps:
        this_run.say(f"{this_run.stage}: the cached log-probs are the reference's up to step {sync.every} of {steps}")
    else:
        this_run.say(f"{this_run.stage}: warning: reference_sync.every is {sync.every} and there are {steps} steps")
    return LiveReference(
        sync,
        lambda: load_language_model(model, replace(loading, frozen=True)),
        policy,
        policy_weights,
        batching,
        per_token=needs_tokens_of_reference(settings.loss),
        say=lambda text: this_run.say(f"{this_run.stage}: {text}"),
    )


def main(
    out: PathOption,
    metrics: PathOption,
    curve: PathOption,
    name: EntryOption = None,
) -> None:
    """Train a policy on the pairs against the cached log-probs of a reference."""
    name, settings = read_entry("train_dpo", TrainDpo, name)
    train_tokens, validation_tokens = settings.tables("preference")
    model, reference = Path(settings.model), Path(settings.reference) if needs_reference(settings.loss) else None
    seed = read_seed(settings)
    trust_remote_code, kernels = read_value("trust_remote_code", bool), read_value("kernels", Kernels)
    runtime = read_runtime("train_dpo")
    processes = join_processes(runtime)
    per_token_for = "ld_alpha" if needs_tokens_of_reference(settings.loss) else None
    train, validation = (
        Pairs(tokens, reference and reference / f"{split}.arrow", per_token_for)
        for tokens, split in ((train_tokens, "train"), (validation_tokens, "validation"))
    )
    for pairs in (train, validation):
        pairs.require_agreement(settings, f"train_dpo.{name}")
    measured = (*metrics_of_loss(settings.loss),)
    columns = (*measured, "grad_norm", "learning_rate", *(f"validation/{name}" for name in measured))
    outs = {"model": out / name, "metrics": metrics / f"{name}.json", "curve": curve / f"{name}.csv"}
    inputs = [train_tokens, validation_tokens, *([reference] if reference else []), model]
    declared = {f"train_dpo.{name}": settings, "seed": seed, "trust_remote_code": trust_remote_code, "kernels": kernels}
    columns += router_columns(settings.router_loss)
    with TrainingRun(f"train_dpo@{name}", declared, inputs, outs, columns, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        for pairs in (train, validation):
            processes.in_main(partial(pairs.require_made_from_inputs, model, this_run))
        quantization = quantization_of_base(settings.lora)
        loading = Loading(
            settings.precision, runtime, processes.device, quantization, trust_remote_code=trust_remote_code
        )
        language_model = load_language_model(model, loading)
        lora = Lora(language_model, settings.lora, seed, model)
        for pairs in (train, validation):
            check_table_fits(pairs.tokens, facts_of(language_model), pairs.tokens_path)
        total = steps_in(len(train), settings.batch_size, settings.epochs)
        module = TokenLogProbs(language_model, chunk_tokens=runtime.logits_chunk_tokens)
        engine = new_engine(module, settings.optimizer, total, runtime, processes)
        # A router's loss counts the tokens of both replies' prompts, so each is read with its own.
        shares = language_model if settings.router_loss is None else None
        batching = micro_batching(runtime, end_and_pad_ids(model)[1], processes, shares)
        objective = PreferenceObjective(batching, settings.loss)
        routed = with_router_loss(objective, settings.router_loss, language_model, 2, f"train_dpo.{name}")
        firsts = first_values(settings.loss) if train.starts_as_reference(model) else {}
        this_run.say(f"{this_run.stage}: {len(train)} pairs, {total} steps{told_first_losses(firsts)}")
        # Before `fit` goes on from a checkpoint: this is the policy as it starts.
        first_rows = rows_of_step(0, len(train), settings.batch_size, settings.epochs, seed)
        for pairs, rows in ((train, first_rows), (validation, slice(settings.batch_size))):
            tell_start(this_run, engine, pairs, rows, batching, settings)
        chosen_before = chosen_at_start(engine, validation, batching, model)

        def policy_weights() -> dict[str, torch.Tensor]:
            weights = engine.master_weights(language_model)
            return processes.in_main(lambda: lora.merged(weights)) or {}

        live = live_reference(this_run, settings, loading, engine, policy_weights, batching, train, total)

        def after_step(step: int) -> None:
            if live:
                live.after_step(step)
            this_run.keep_model(step, engine, lora, settings, tokenizer_from=model)

        best = fit(
            this_run,
            engine,
            routed,
            LivePairs(train, live) if live else train,
            LivePairs(validation, live) if live else validation,
            settings,
            seed,
            weights=lambda: lora.trained(engine.master_weights(language_model)),
            shown=SHOWN,
            after_step=after_step,
            after_evaluation=shown_replies(this_run, engine, language_model, validation, model),
            parts={"reference": live} if live else {},
        )
        results = {f"validation_{key.replace('/', '_')}": value for key, value in best.results.items()}
        # Both, and not their difference, in which float32's last place of a sum of hundreds of nats would show.
        results |= {"validation_logps_chosen_before": chosen_before}
        results |= {"train_rows": len(train), "validation_rows": len(validation)}
        if told := told_displacement(best.results["logps/chosen"] - chosen_before):
            this_run.say(f"{this_run.stage}: {told}")
        publish_kept(this_run, engine, lora, best, results, settings, tokenizer_from=model)
    processes.leave()


if __name__ == "__main__":
    run(main)
