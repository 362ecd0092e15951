"""Supervised fine-tuning: cross-entropy on completion tokens.

    L = − Σ_t m_t log π(y_t | x, y_<t) / Σ_t m_t

with m the loss mask and both sums over the whole optimizer step: all its rows, micro-batches and processes.

    python -m stages.train_sft --tokens data/tokens/sft --model models/base --out models/sft \\
        --metrics metrics/train_sft.json --curve metrics/curves/train_sft.csv
"""

from __future__ import annotations

from stages.lib.command.kernels import Kernels
from stages.lib.command.params import read_params, read_value
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
    from stages.lib.objectives.fit import fit, global_means
    from stages.lib.objectives.sft import SftObjective
    from stages.lib.runs.publish_kept import publish_kept
    from stages.lib.runs.training_run import TrainingRun

COLUMNS = ("loss", "grad_norm", "learning_rate", "eval/loss")
SHOWN = ("loss", "grad_norm", "eval/loss")


def main(tokens: PathOption, model: PathOption, out: PathOption, metrics: PathOption, curve: PathOption) -> None:
    """Fine-tune MODEL on the completions in TOKENS."""
    settings = read_params("train_sft", TrainSft)
    seed = read_value("seed", int)
    trust_remote_code, kernels = read_value("trust_remote_code", bool), read_value("kernels", Kernels)
    runtime = read_runtime("train_sft")
    processes = join_processes(runtime)
    train, held_out = (read_table(tokens / f"{split}.arrow", SFT_SCHEMA) for split in ("train", "eval"))
    require_tokens_of(tokens, model)
    outs = {"model": out, "metrics": metrics, "curve": curve}
    declared = {"train_sft": settings, "seed": seed, "trust_remote_code": trust_remote_code, "kernels": kernels}
    with TrainingRun("train_sft", declared, [tokens, model], outs, COLUMNS, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        quantization = quantization_of_base(settings.lora)
        loading = Loading(
            settings.precision, runtime, processes.device, quantization, trust_remote_code=trust_remote_code
        )
        language_model = load_language_model(model, loading)
        lora = Lora(language_model, settings.lora, seed, model)
        for table, split in ((train, "train"), (held_out, "eval")):
            check_table_fits(table, facts_of(language_model), tokens / f"{split}.arrow")
        total = steps_in(len(train), settings.batch_size, settings.epochs)
        module = TokenLogProbs(language_model, chunk_tokens=runtime.logits_chunk_tokens)
        engine = new_engine(module, settings.optimizer, total, runtime, processes)
        objective = SftObjective(micro_batching(runtime, end_and_pad_ids(model)[1], processes))
        base_loss = global_means(objective, engine, held_out[:], train=False)["loss"]
        this_run.say(f"train_sft: {len(train)} rows, {total} steps; held-out loss of the base model {base_loss:.4f}")
        best = fit(
            this_run,
            engine,
            objective,
            train,
            held_out,
            settings,
            seed,
            weights=lambda: lora.trained(engine.master_weights(language_model)),
            shown=SHOWN,
        )
        results = {
            "eval_loss": best.results["loss"],
            "eval_loss_base": base_loss,
            "train_rows": len(train),
            "steps": total,
        }
        publish_kept(this_run, engine, lora, best, results, settings, tokenizer_from=model)
    processes.leave()


if __name__ == "__main__":
    run(main)
