"""Supervised fine-tuning: cross-entropy on completion tokens, or dynamic fine-tuning.

    cross_entropy  L = − Σ_t m_t log π_t / Σ_t m_t
    dft            L = − Σ_t m_t sg(π_t) log π_t / Σ_t m_t   (arXiv 2508.05629, Eq. 9; sg stops the gradient)

with π_t = π(y_t | x, y_<t), m the loss mask and both sums over the whole optimizer step: all its rows, micro-batches
and processes. With `neftune_alpha` the embeddings of training rows get noise (arXiv 2310.05914).

The model that it starts from is named in params.yaml.

    python -m stages.train_sft --out models --metrics metrics/training --curve metrics/curves --name sft
"""

from __future__ import annotations

from pathlib import Path

from stages.lib.command.entries import EntryOption, read_entry
from stages.lib.command.kernels import Kernels
from stages.lib.command.params import read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.models.tokenizer_files import require_tokens_of
from stages.lib.settings.lora import quantization_of_base
from stages.lib.settings.runtime import read_runtime
from stages.lib.settings.train_sft import TrainSft

if not asks_for_help():
    from stages.lib.compute.batching import micro_batching, steps_in
    from stages.lib.compute.engine.choice import new_engine
    from stages.lib.compute.processes import join_processes
    from stages.lib.data.token_tables import SFT_SCHEMA, check_table_fits, read_table
    from stages.lib.models.lora import Lora
    from stages.lib.models.pretrained import Loading, end_and_pad_ids, facts_of, load_language_model
    from stages.lib.models.token_logprobs import TokenLogProbs
    from stages.lib.objectives.embedding_noise import EmbeddingNoise
    from stages.lib.objectives.fit import fit, global_means
    from stages.lib.objectives.router_loss import router_columns, with_router_loss
    from stages.lib.objectives.sft import SftObjective
    from stages.lib.runs.publish_kept import publish_kept
    from stages.lib.runs.shown_replies import shown_replies
    from stages.lib.runs.training_run import TrainingRun

METRICS = ("loss", "perplexity", "entropy", "token_accuracy")
COLUMNS = (*METRICS, "grad_norm", "learning_rate", *(f"validation/{name}" for name in METRICS))
SHOWN = ("loss", "token_accuracy", "grad_norm", "validation/loss")


def main(
    out: PathOption,
    metrics: PathOption,
    curve: PathOption,
    name: EntryOption = None,
) -> None:
    """Fine-tune a model on the completions."""
    name, settings = read_entry("train_sft", TrainSft, name)
    train_tokens, validation_tokens = settings.tables("sft")
    model = Path(settings.model)
    seed = read_value("seed", int)
    trust_remote_code, kernels = read_value("trust_remote_code", bool), read_value("kernels", Kernels)
    runtime = read_runtime("train_sft")
    processes = join_processes(runtime)
    train, validation = (read_table(path, SFT_SCHEMA) for path in (train_tokens, validation_tokens))
    for path in (train_tokens, validation_tokens):
        require_tokens_of(path, model)
    inputs = [train_tokens, validation_tokens, model]
    outs = {"model": out / name, "metrics": metrics / f"{name}.json", "curve": curve / f"{name}.csv"}
    declared = {f"train_sft.{name}": settings, "seed": seed, "trust_remote_code": trust_remote_code, "kernels": kernels}
    columns = (*COLUMNS, *router_columns(settings.router_loss))
    with TrainingRun(f"train_sft@{name}", declared, inputs, outs, columns, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        quantization = quantization_of_base(settings.lora)
        loading = Loading(
            settings.precision, runtime, processes.device, quantization, trust_remote_code=trust_remote_code
        )
        language_model = load_language_model(model, loading)
        lora = Lora(language_model, settings.lora, seed, model)
        for table, path in ((train, train_tokens), (validation, validation_tokens)):
            check_table_fits(table, facts_of(language_model), path)
        total = steps_in(len(train), settings.batch_size, settings.epochs)
        module = TokenLogProbs(language_model, chunk_tokens=runtime.logits_chunk_tokens)
        engine = new_engine(module, settings.optimizer, total, runtime, processes)
        alpha, embeddings = settings.neftune_alpha, language_model.get_input_embeddings()
        noise = None if alpha is None else EmbeddingNoise(embeddings, alpha, seed)
        batching = micro_batching(runtime, end_and_pad_ids(model)[1], processes)
        objective = SftObjective(batching, settings.loss.type, noise)
        routed = with_router_loss(objective, settings.router_loss, language_model, 1, f"train_sft.{name}")
        base_loss = global_means(objective, engine, validation[:], train=False)["loss"]
        this_run.say(
            f"{this_run.stage}: {len(train)} rows, {total} steps; validation loss before training {base_loss:.4f}"
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
        results = {
            **{f"validation_{metric}": value for metric, value in best.results.items()},
            "validation_loss_before": base_loss,
            "train_rows": len(train),
        }
        publish_kept(this_run, engine, lora, best, results, settings, tokenizer_from=model)
    processes.leave()


if __name__ == "__main__":
    run(main)
