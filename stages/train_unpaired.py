"""Optimisation on single replies that are good or bad, from cached log-probs of a reference; no reference in memory.

    kto                L = λ (1 − σ(s β (Δ − z0)))       (arXiv 2402.01306), z0 = max(0, mean Δ of mismatched replies)
    bco                L = −log σ(s (β Δ − δ))           (arXiv 2404.04656), δ the running mean of β Δ
    apo_zero_unpaired  L = 1 − σ(s β Δ)                  (arXiv 2408.06266, Eq. 7)

with Δ = log π(y|x) − log π_ref(y|x) summed over completion tokens and s = +1 for a good reply, −1 for a bad one; the
mean is over all replies of the optimizer step. z0 and δ are of the whole step as well, and no gradient passes through
them: a pass over the mismatched replies (kto) or the step's own (bco) comes before those that train.

The model that it starts from and the reference's log-probs are named in params.yaml. Where the reference is that model,
Δ is 0 before the first step, and this is checked; of another reference |Δ| is printed as it is.

    python -m stages.train_unpaired --out models --metrics metrics/training --curve metrics/curves --name kto
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from stages.lib.command.entries import EntryOption, read_entry
from stages.lib.command.kernels import Kernels
from stages.lib.command.params import read_seed, read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.models.tokenizer_files import require_tokens_of
from stages.lib.settings.lora import quantization_of_base
from stages.lib.settings.runtime import read_runtime
from stages.lib.settings.train_unpaired import TrainUnpaired

if not asks_for_help():
    from stages.lib.compute.batching import micro_batching, rows_of_step, steps_in
    from stages.lib.compute.engine.choice import new_engine
    from stages.lib.compute.processes import join_processes
    from stages.lib.data.reference_tables import (
        MODEL_PATH,
        read_unpaired_reference,
        require_computed_alike,
        require_made_from,
    )
    from stages.lib.data.token_tables import UNPAIRED_SCHEMA, check_table_fits, read_note, read_table
    from stages.lib.models.lora import Lora
    from stages.lib.models.pretrained import Loading, end_and_pad_ids, facts_of, load_language_model
    from stages.lib.models.token_logprobs import TokenLogProbs
    from stages.lib.objectives.fit import fit
    from stages.lib.objectives.router_loss import router_columns, with_router_loss
    from stages.lib.objectives.unpaired import UnpairedObjective, metrics_of_replies
    from stages.lib.objectives.unpaired_start import mean_log_ratio, require_unpaired_start
    from stages.lib.runs.model_card import shareable_path
    from stages.lib.runs.publish_kept import publish_kept
    from stages.lib.runs.shown_replies import shown_replies
    from stages.lib.runs.training_run import TrainingRun

SHOWN = ("loss", "rewards/margins", "kl", "delta", "validation/loss")


class UnpairedReplies:
    """Unpaired tokens joined with the reference log-probs of the same rows."""

    def __init__(self, tokens: Path, ref_logprobs: Path, loss: str) -> None:
        self.tokens_path, self.path = tokens, ref_logprobs
        self.tokens = read_table(tokens, UNPAIRED_SCHEMA)
        needs = "the loss kto" if loss == "kto" else None
        self.reference = read_unpaired_reference(ref_logprobs, self.tokens, tokens, mismatched_for=needs)

    def starts_as_reference(self, model: Path) -> bool:
        """Whether the reference is, by its path, the model that the policy starts from."""
        return read_note(self.path, MODEL_PATH) == shareable_path(str(model))

    def require_agreement(self, settings: TrainUnpaired, where: str) -> None:
        """Raise StageError if tokens or reference are not of the model of the start, before its first step."""
        model = Path(settings.model)
        require_tokens_of(self.tokens_path, model)
        if self.starts_as_reference(model):
            require_computed_alike(self.path, settings.precision, quantization_of_base(settings.lora), where)

    def require_made_from_inputs(self, model: Path, this_run: TrainingRun) -> None:
        """Raise StageError if the reference is of other tokens, or of other weights of the model of the start."""
        hashes = this_run.own_scratch.input_hashes
        inputs = {"tokens": self.tokens_path} | ({"model": model} if self.starts_as_reference(model) else {})
        require_made_from(self.path, **{note: (path, hashes[str(path)]) for note, path in inputs.items()})

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> dict[str, list]:
        return {**self.tokens[rows], **self.reference[rows]}


def main(out: PathOption, metrics: PathOption, curve: PathOption, name: EntryOption = None) -> None:
    """Train a policy on good and bad replies against the cached log-probs of a reference."""
    name, settings = read_entry("train_unpaired", TrainUnpaired, name)
    train_tokens, validation_tokens = settings.tables("unpaired")
    model, reference = Path(settings.model), Path(settings.reference)
    seed = read_seed(settings)
    trust_remote_code, kernels = read_value("trust_remote_code", bool), read_value("kernels", Kernels)
    runtime = read_runtime("train_unpaired")
    processes = join_processes(runtime)
    train = UnpairedReplies(train_tokens, reference / "train.arrow", settings.loss.type)
    validation = UnpairedReplies(validation_tokens, reference / "validation.arrow", settings.loss.type)
    for replies in (train, validation):
        replies.require_agreement(settings, f"train_unpaired.{name}")
    outs = {"model": out / name, "metrics": metrics / f"{name}.json", "curve": curve / f"{name}.csv"}
    inputs = [train_tokens, validation_tokens, reference, model]
    declared = {f"train_unpaired.{name}": settings, "seed": seed}
    declared |= {"trust_remote_code": trust_remote_code, "kernels": kernels}
    measured = metrics_of_replies(settings.loss)
    columns = (*measured, "grad_norm", "learning_rate", *(f"validation/{metric}" for metric in measured))
    columns += router_columns(settings.router_loss)
    with TrainingRun(f"train_unpaired@{name}", declared, inputs, outs, columns, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        for replies in (train, validation):
            processes.in_main(partial(replies.require_made_from_inputs, model, this_run))
        quantization = quantization_of_base(settings.lora)
        loading = Loading(
            settings.precision, runtime, processes.device, quantization, trust_remote_code=trust_remote_code
        )
        language_model = load_language_model(model, loading)
        lora = Lora(language_model, settings.lora, seed, model)
        for replies in (train, validation):
            check_table_fits(replies.tokens, facts_of(language_model), replies.tokens_path)
        total = steps_in(len(train), settings.batch_size, settings.epochs)
        module = TokenLogProbs(language_model, chunk_tokens=runtime.logits_chunk_tokens)
        engine = new_engine(module, settings.optimizer, total, runtime, processes)
        batching = micro_batching(runtime, end_and_pad_ids(model)[1], processes)
        objective = UnpairedObjective(batching, settings.loss)
        routed = with_router_loss(objective, settings.router_loss, language_model, 1, f"train_unpaired.{name}")
        good = sum(train.tokens["label"][:])
        this_run.say(f"{this_run.stage}: {good} good and {len(train) - good} bad replies, {total} steps")
        # Before `fit` goes on from a checkpoint: this is the policy as it starts.
        first_rows = rows_of_step(0, len(train), settings.batch_size, settings.epochs, seed)
        for replies, rows in ((train, first_rows), (validation, slice(settings.batch_size))):
            if replies.starts_as_reference(model):
                require_unpaired_start(engine, replies[rows], batching, replies.path, settings.precision)
            else:
                distance = mean_log_ratio(engine, replies[rows], batching)
                this_run.say(
                    f"{this_run.stage}: mean |log-ratio| to the reference of {replies.path} is {distance:.4g} nats at "
                    "the start"
                )
        best = fit(
            this_run,
            engine,
            routed,
            train,
            validation,
            settings,
            seed,
            weights=lambda: lora.trained(engine.master_weights(language_model)),
            shown=SHOWN,
            after_step=lambda step: this_run.keep_model(step, engine, lora, settings, tokenizer_from=model),
            after_evaluation=shown_replies(this_run, engine, language_model, validation, model),
        )
        results = {f"validation_{key.replace('/', '_')}": value for key, value in best.results.items()}
        results |= {"train_rows": len(train), "validation_rows": len(validation)}
        publish_kept(this_run, engine, lora, best, results, settings, tokenizer_from=model)
    processes.leave()


if __name__ == "__main__":
    run(main)
