"""Reward model: a scalar head on the last real token, trained on preference pairs.

    L = − Σ_i log σ(r(x, y_c) − r(x, y_r) − m_i) / n

over the n pairs of the optimizer step (Bradley–Terry; InstructGPT, arXiv 2203.02155; the optional margin m as in
Llama 2, arXiv 2307.09288).

The model that it starts from is named in params.yaml (train_rm.init_from).

    python -m stages.train_rm --tokens data/tokens/preference --out models/rm \\
        --metrics metrics/train_rm.json --curve metrics/curves/train_rm.csv
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.command.params import read_params, read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.evaluation.intervals import wilson_interval
from stages.lib.models.tokenizer_files import require_tokens_of
from stages.lib.settings.lora import quantization_of_base
from stages.lib.settings.runtime import read_runtime
from stages.lib.settings.train_rm import TrainRm

if not asks_for_help():
    import torch

    from stages.lib.compute.batching import (
        MicroBatching,
        is_due,
        micro_batching,
        rows_of_step,
        steps_in,
        tokens_in_pairs,
    )
    from stages.lib.compute.engine.base import Engine, require_finite
    from stages.lib.compute.engine.choice import new_engine
    from stages.lib.compute.processes import join_processes
    from stages.lib.data.token_tables import PREFERENCE_SCHEMA, check_table_fits, read_table
    from stages.lib.models.lora import Lora
    from stages.lib.models.pretrained import Loading, end_and_pad_ids, facts_of, new_classifier
    from stages.lib.models.scalar_scores import SequenceScores
    from stages.lib.objectives.pairwise_loss import pairwise_logistic_losses
    from stages.lib.runs.best_weights import BestWeights
    from stages.lib.runs.training_run import TrainingRun

PAIR_METRICS = ("loss", "accuracy", "rewards/chosen", "rewards/rejected", "rewards/margins")
COLUMNS = (*PAIR_METRICS, "grad_norm", "learning_rate", "eval/loss", "eval/accuracy", "eval/rewards/margins")


class PairLoss:
    """The loss and metrics of pairs, each process running its part of the micro-batches."""

    def __init__(self, settings: TrainRm, batching: MicroBatching) -> None:
        self.use_margin = settings.use_margin
        self.batching = batching

    def __call__(self, engine: Engine, pairs: dict[str, list], *, train: bool) -> dict[str, float]:
        """Add the gradient of the mean loss (if `train`). Returns the means of PAIR_METRICS over all processes."""
        sums = self.batching.budget.attempt(lambda: self._own_passes(engine, pairs, train), engine)
        means = [total / len(pairs["prompt_ids"]) for total in self.batching.processes.sum(sums.tolist())]
        return dict(zip(PAIR_METRICS, means, strict=True))

    def _own_passes(self, engine: Engine, pairs: dict[str, list], train: bool) -> torch.Tensor:
        """The sums of PAIR_METRICS over this process's passes."""
        count = len(pairs["prompt_ids"])
        sums = torch.zeros(len(PAIR_METRICS), dtype=torch.float64)
        for batch in self.batching.pairs(pairs["prompt_ids"], pairs["chosen_ids"], pairs["rejected_ids"]):
            with torch.set_grad_enabled(train):
                chosen, rejected = engine(*batch.inputs, batch.end_mask).tensor_split(2)
                margins = [pairs["margin"][row] if self.use_margin else 0.0 for row in batch.rows]
                losses = pairwise_logistic_losses(chosen, rejected, torch.tensor(margins, device=chosen.device))
                if train:
                    engine.backward(losses.sum() / count)
            correct = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
            parts = (losses, correct, chosen, rejected, chosen - rejected)
            sums += torch.stack([part.detach().double().sum().cpu() for part in parts])
        return sums


def main(tokens: PathOption, out: PathOption, metrics: PathOption, curve: PathOption) -> None:
    """Train a reward model on the pairs in TOKENS."""
    settings = read_params("train_rm", TrainRm)
    model = Path(settings.init_from)
    seed = read_value("seed", int)
    trust_remote_code = read_value("trust_remote_code", bool)
    runtime = read_runtime("train_rm")
    processes = join_processes(runtime)
    train, held_out = (read_table(tokens / f"{split}.arrow", PREFERENCE_SCHEMA) for split in ("train", "eval"))
    require_tokens_of(tokens, model)
    outs = {"model": out, "metrics": metrics, "curve": curve}
    declared = {"train_rm": settings, "seed": seed, "trust_remote_code": trust_remote_code}
    with TrainingRun("train_rm", declared, [tokens, model], outs, COLUMNS, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        quantization = quantization_of_base(settings.lora)
        loading = Loading(
            settings.precision, runtime, processes.device, quantization, trust_remote_code=trust_remote_code
        )
        classifier = new_classifier(model, loading, seed)
        lora = Lora(classifier, settings.lora, seed, model)
        for table, split in ((train, "train"), (held_out, "eval")):
            check_table_fits(table, facts_of(classifier), tokens / f"{split}.arrow")
            if settings.use_margin:
                require_margins(table, tokens / f"{split}.arrow")
        total = steps_in(len(train), settings.batch_size, settings.epochs)
        engine = new_engine(SequenceScores(classifier), settings.optimizer, total, runtime, processes)
        best = BestWeights(settings.keep, is_main=processes.is_main)
        pair_loss = PairLoss(settings, micro_batching(runtime, end_and_pad_ids(model)[1], processes))
        this_run.say(f"train_rm: {len(train)} pairs, {total} steps")
        for step in this_run.steps(total, engine=engine, best=best, budget=pair_loss.batching.budget):
            rows = rows_of_step(step, len(train), settings.batch_size, settings.epochs, seed)
            batch = train[rows]
            row = {"learning_rate": engine.learning_rate, **pair_loss(engine, batch, train=True)}
            require_finite(row["loss"], "loss", step)
            row["grad_norm"] = engine.step()
            if is_due(step + 1, settings.eval_every, total):
                with engine.averaged():
                    results = pair_loss(engine, held_out[:], train=False)
                    require_finite(results["loss"], "held-out loss", step)
                    best.offer(results, step + 1, lambda: lora.trained(engine.master_weights(classifier)))
                row |= {f"eval/{name}": results[name] for name in ("loss", "accuracy", "rewards/margins")}
            this_run.record(step, tokens_in_pairs(batch), row, ("loss", "accuracy", "rewards/margins", "eval/accuracy"))
        with engine.averaged():
            weights = engine.master_weights(classifier)
            kept = best.choose(lambda: lora.trained(weights))
            results = summarise(kept.results, len(held_out))
            results |= {"train_rows": len(train), "steps": total, "kept_step": kept.step, **lora.counts()}
            this_run.publish_model(
                classifier,
                processes.in_main(lambda: lora.merged(weights | kept.weights)),
                results,
                save_dtype=settings.save_dtype,
                tokenizer_from=model,
                build_others=lambda staged: lora.save_adapter(kept.weights, staged["model"], settings.save_dtype),
            )
    processes.leave()


def require_margins(table: Any, path: Path) -> None:
    """Raise a StageError that names the first row without a margin."""
    for row, margin in zip(table["row"], table["margin"], strict=True):
        if margin is None:
            raise StageError(f"{path}, row {row} has no margin: set train_rm.use_margin: false, or give every pair one")


def summarise(held_out_means: dict[str, float], pairs: int) -> dict[str, float]:
    """The stage's metrics, of the weights it publishes: accuracy with its 95 % Wilson interval, loss, rewards."""
    low, high = wilson_interval(held_out_means["accuracy"] * pairs, pairs)
    return {
        "eval_accuracy": held_out_means["accuracy"],
        "eval_accuracy_ci_low": low,
        "eval_accuracy_ci_high": high,
        "eval_loss": held_out_means["loss"],
        "eval_reward_margin": held_out_means["rewards/margins"],
        "eval_reward_chosen": held_out_means["rewards/chosen"],
        "eval_reward_rejected": held_out_means["rewards/rejected"],
        "eval_rows": pairs,
    }


if __name__ == "__main__":
    run(main)
