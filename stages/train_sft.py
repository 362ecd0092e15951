"""Supervised fine-tuning: cross-entropy on completion tokens.

    L = − Σ_t m_t log π(y_t | x, y_<t) / Σ_t m_t

with m the loss mask and both sums over the whole optimizer step: all its rows, micro-batches and processes.

    python -m stages.train_sft --tokens data/tokens/sft --model models/base --out models/sft \\
        --metrics metrics/train_sft.json --curve metrics/curves/train_sft.csv
"""

from __future__ import annotations

from typing import Any

from stages.lib.command.params import read_params, read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.models.tokenizer_files import require_tokens_of
from stages.lib.settings.lora import quantization_of_base
from stages.lib.settings.runtime import read_runtime
from stages.lib.settings.train_sft import TrainSft

if not asks_for_help():
    import torch

    from stages.lib.compute.batching import MicroBatching, is_due, micro_batching, rows_of_step, steps_in
    from stages.lib.compute.engine.base import Engine, require_finite
    from stages.lib.compute.engine.choice import new_engine
    from stages.lib.compute.processes import join_processes
    from stages.lib.data.token_tables import SFT_SCHEMA, check_table_fits, read_table
    from stages.lib.models.lora import Lora
    from stages.lib.models.pretrained import Loading, end_and_pad_ids, facts_of, load_language_model
    from stages.lib.models.token_logprobs import TokenLogProbs
    from stages.lib.runs.best_weights import BestWeights
    from stages.lib.runs.training_run import TrainingRun

COLUMNS = ("loss", "grad_norm", "learning_rate", "eval/loss")


class TokenLoss:
    """Summed cross-entropy of rows, each process running its part of the micro-batches."""

    def __init__(self, batching: MicroBatching) -> None:
        self.batching = batching

    def __call__(self, engine: Engine, rows: dict[str, list], *, train: bool) -> tuple[float, int]:
        """Add the gradient of the mean loss (if `train`). Returns (loss sum, tokens), both over all processes."""
        tokens = sum(sum(mask) for mask in rows["loss_mask"])
        loss_sum = self.batching.budget.attempt(lambda: self._own_passes(engine, rows, tokens, train), engine)
        return self.batching.processes.sum([loss_sum])[0], tokens

    def _own_passes(self, engine: Engine, rows: dict[str, list], tokens: int, train: bool) -> float:
        """The loss sum of this process's passes; `tokens` is the denominator of the gradient."""
        loss_sum = 0.0
        for batch in self.batching.masked(rows["input_ids"], rows["loss_mask"]):
            with torch.set_grad_enabled(train):
                logps, _ = engine(*batch.inputs, batch.completion_mask)
                if train:
                    engine.backward(-logps.sum() / tokens)
            loss_sum -= float(logps.detach().sum())
        return loss_sum


def main(tokens: PathOption, model: PathOption, out: PathOption, metrics: PathOption, curve: PathOption) -> None:
    """Fine-tune MODEL on the completions in TOKENS."""
    settings = read_params("train_sft", TrainSft)
    seed = read_value("seed", int)
    trust_remote_code = read_value("trust_remote_code", bool)
    runtime = read_runtime("train_sft")
    processes = join_processes(runtime)
    train, held_out = (read_table(tokens / f"{split}.arrow", SFT_SCHEMA) for split in ("train", "eval"))
    require_tokens_of(tokens, model)
    outs = {"model": out, "metrics": metrics, "curve": curve}
    declared = {"train_sft": settings, "seed": seed, "trust_remote_code": trust_remote_code}
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
        best = BestWeights(settings.keep, is_main=processes.is_main)
        token_loss = TokenLoss(micro_batching(runtime, end_and_pad_ids(model)[1], processes))
        base_loss = held_out_loss(engine, held_out, token_loss)
        this_run.say(f"train_sft: {len(train)} rows, {total} steps; held-out loss of the base model {base_loss:.4f}")
        for step in this_run.steps(total, engine=engine, best=best, budget=token_loss.batching.budget):
            rows = rows_of_step(step, len(train), settings.batch_size, settings.epochs, seed)
            learning_rate = engine.learning_rate
            batch = train[rows]
            loss_sum, count = token_loss(engine, batch, train=True)
            require_finite(loss_sum, "loss", step)
            row = {"loss": loss_sum / count, "learning_rate": learning_rate, "grad_norm": engine.step()}
            if is_due(step + 1, settings.eval_every, total):
                with engine.averaged():
                    row["eval/loss"] = held_out_loss(engine, held_out, token_loss)
                    require_finite(row["eval/loss"], "held-out loss", step)
                    results = {"loss": row["eval/loss"]}
                    best.offer(results, step + 1, lambda: lora.trained(engine.master_weights(language_model)))
            this_run.record(step, sum(map(len, batch["input_ids"])), row, ("loss", "grad_norm", "eval/loss"))
        with engine.averaged():
            weights = engine.master_weights(language_model)
            kept = best.choose(lambda: lora.trained(weights))
            results = {
                "eval_loss": kept.results["loss"],
                "eval_loss_base": base_loss,
                "train_rows": len(train),
                "steps": total,
                "kept_step": kept.step,
                **lora.counts(),
            }
            this_run.publish_model(
                language_model,
                processes.in_main(lambda: lora.merged(weights | kept.weights)),
                results,
                save_dtype=settings.save_dtype,
                tokenizer_from=model,
                build_others=lambda staged: lora.save_adapter(kept.weights, staged["model"], settings.save_dtype),
            )
    processes.leave()


def held_out_loss(engine: Engine, table: Any, token_loss: TokenLoss) -> float:
    """Mean cross-entropy per completion token over a whole table, in nats."""
    loss_sum, tokens = token_loss(engine, table[:], train=False)
    return loss_sum / tokens


if __name__ == "__main__":
    run(main)
