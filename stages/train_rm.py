"""Reward model: a scalar head on the last real token, trained on preference pairs, or on the scores of replies.

    pairwise      L = − Σ_i log σ(r(x, y_c) − r(x, y_r) − m_i) / n
    regression    L = Σ_i (r(x, y_i) − s_i)² / n

over the n pairs (Bradley–Terry; InstructGPT, arXiv 2203.02155) or replies of the optimizer step; margins m, label
smoothing and centring by the block `loss`.

It starts from the model that params.yaml names: a language model, whose body gets a new head, or another reward model,
which keeps its head. Mean and standard deviation of its scores of validation replies are left in its config.json.

    python -m stages.train_rm --out models --metrics metrics/training --curve metrics/curves --name rm
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from stages.lib.command.entries import EntryOption, read_entry
from stages.lib.command.errors import StageError
from stages.lib.command.kernels import Kernels
from stages.lib.command.params import read_value
from stages.lib.command.run import PathOption, asks_for_help, run
from stages.lib.evaluation.intervals import wilson_interval
from stages.lib.models.reward_head import ScoreScale
from stages.lib.models.tokenizer_files import require_tokens_of
from stages.lib.settings.lora import quantization_of_base
from stages.lib.settings.reward_loss import RegressionLoss, RewardLoss
from stages.lib.settings.runtime import read_runtime
from stages.lib.settings.train_rm import TrainRm

if not asks_for_help():
    from stages.lib.compute.batching import micro_batching, steps_in
    from stages.lib.compute.engine.choice import new_engine
    from stages.lib.compute.processes import join_processes
    from stages.lib.data.token_tables import PREFERENCE_SCHEMA, UNPAIRED_SCHEMA, check_table_fits, read_table
    from stages.lib.models.lora import Lora
    from stages.lib.models.pretrained import Loading, end_and_pad_ids, facts_of
    from stages.lib.models.reward_models import load_reward_start
    from stages.lib.models.scalar_scores import SequenceScores
    from stages.lib.objectives.fit import fit
    from stages.lib.objectives.reward import RewardObjective, ScoreObjective
    from stages.lib.objectives.router_loss import router_columns, with_router_loss
    from stages.lib.runs.publish_kept import publish_kept
    from stages.lib.runs.training_run import TrainingRun

COLUMNS = {
    "pairwise": (
        *("loss", "accuracy", "rewards/chosen", "rewards/rejected", "rewards/margins", "grad_norm", "learning_rate"),
        *("validation/loss", "validation/accuracy", "validation/rewards/margins"),
    ),
    "regression": ("loss", "rewards/mean", "grad_norm", "learning_rate", "validation/loss", "validation/rewards/mean"),
}
SHOWN = {
    "pairwise": ("loss", "accuracy", "rewards/margins", "validation/accuracy"),
    "regression": ("loss", "rewards/mean", "validation/loss"),
}


def main(
    out: PathOption,
    metrics: PathOption,
    curve: PathOption,
    name: EntryOption = None,
) -> None:
    """Train a reward model on pairs or scores."""
    name, settings = read_entry("train_rm", TrainRm, name)
    loss = settings.loss
    train_tokens, validation_tokens = settings.tables(settings.kind)
    model = Path(settings.model)
    seed = read_value("seed", int)
    trust_remote_code, kernels = read_value("trust_remote_code", bool), read_value("kernels", Kernels)
    runtime = read_runtime("train_rm")
    processes = join_processes(runtime)
    schema = UNPAIRED_SCHEMA if isinstance(loss, RegressionLoss) else PREFERENCE_SCHEMA
    train, validation = (read_table(path, schema) for path in (train_tokens, validation_tokens))
    for path in (train_tokens, validation_tokens):
        require_tokens_of(path, model)
    inputs = [train_tokens, validation_tokens, model]
    outs = {"model": out / name, "metrics": metrics / f"{name}.json", "curve": curve / f"{name}.csv"}
    declared = {f"train_rm.{name}": settings, "seed": seed, "trust_remote_code": trust_remote_code, "kernels": kernels}
    columns = (*COLUMNS[loss.type], *router_columns(settings.router_loss))
    with TrainingRun(f"train_rm@{name}", declared, inputs, outs, columns, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        quantization = quantization_of_base(settings.lora)
        loading = Loading(
            settings.precision, runtime, processes.device, quantization, trust_remote_code=trust_remote_code
        )
        classifier = load_reward_start(model, loading, seed)
        lora = Lora(classifier, settings.lora, seed, model)
        for table, path in ((train, train_tokens), (validation, validation_tokens)):
            check_table_fits(table, facts_of(classifier), path)
            require_what_is_read(table, path, loss, f"train_rm.{name}.loss")
        total = steps_in(len(train), settings.batch_size, settings.epochs)
        engine = new_engine(SequenceScores(classifier), settings.optimizer, total, runtime, processes)
        # A router's loss counts the tokens of both replies' prompts, so each is read with its own.
        shares = classifier if settings.router_loss is None else None
        batching = micro_batching(runtime, end_and_pad_ids(model)[1], processes, shares)
        regression = isinstance(loss, RegressionLoss)
        objective = ScoreObjective(batching) if isinstance(loss, RegressionLoss) else RewardObjective(batching, loss)
        each, rows = (1, "replies") if regression else (2, "pairs")
        routed = with_router_loss(objective, settings.router_loss, classifier, each, f"train_rm.{name}")
        this_run.say(f"{this_run.stage}: {len(train)} {rows}, {total} steps")
        if not regression and not loss.use_margin and train.data.column("margin").null_count < len(train):
            this_run.say(f"{this_run.stage}: the pairs' margins are not read (loss.use_margin: false)")
        best = fit(
            this_run,
            engine,
            routed,
            train,
            validation,
            settings,
            seed,
            weights=lambda: lora.trained(engine.master_weights(classifier)),
            shown=SHOWN[loss.type],
            after_step=lambda step: this_run.keep_model(step, engine, lora, settings, tokenizer_from=model),
        )
        results = (of_replies if regression else of_pairs)(best.results, len(validation)) | {"train_rows": len(train)}
        scale = ScoreScale(results["validation_reward_mean"], results["validation_reward_std"])
        classifier.config.update(scale._asdict())
        publish_kept(this_run, engine, lora, best, results, settings, tokenizer_from=model)
    processes.leave()


def require_what_is_read(table: Any, path: Path, loss: RewardLoss, key: str) -> None:
    """Raise a StageError that names the first row without a score or a margin, where the loss needs one."""
    column, advice = "score", "name the column of the scores in the threshold of its source"
    if not isinstance(loss, RegressionLoss):
        if not loss.use_margin:
            return
        column, advice = "margin", f"set {key}.use_margin: false, or give every pair one"
    for row, value in zip(table["row"], table[column], strict=True):
        if value is None:
            raise StageError(f"{path}, row {row} has no {column}: {advice}")


def of_pairs(means: dict[str, float], pairs: int) -> dict[str, float]:
    """The stage's metrics, of the weights it publishes: accuracy with its 95 % Wilson interval, loss, rewards."""
    low, high = wilson_interval(means["accuracy"] * pairs, pairs)
    mean = (means["rewards/chosen"] + means["rewards/rejected"]) / 2
    return {
        "validation_accuracy": means["accuracy"],
        "validation_accuracy_ci_low": low,
        "validation_accuracy_ci_high": high,
        "validation_loss": means["loss"],
        "validation_reward_margin": means["rewards/margins"],
        "validation_reward_chosen": means["rewards/chosen"],
        "validation_reward_rejected": means["rewards/rejected"],
        "validation_reward_mean": mean,
        "validation_reward_std": sample_deviation(means["rewards/squares"], mean, 2 * pairs),
        "validation_rows": pairs,
    }


def of_replies(means: dict[str, float], replies: int) -> dict[str, float]:
    """The same of a regression: the loss, rewards beside scores, and their correlation where neither is constant."""
    mean, of_scores = means["rewards/mean"], means["scores/mean"]
    deviation = sample_deviation(means["rewards/squares"], mean, replies)
    of_scores_deviation = sample_deviation(means["scores/squares"], of_scores, replies)
    results = {
        "validation_loss": means["loss"],
        "validation_reward_mean": mean,
        "validation_reward_std": deviation,
        "validation_score_mean": of_scores,
        "validation_score_std": of_scores_deviation,
        "validation_rows": replies,
    }
    if deviation > 0 and of_scores_deviation > 0:
        covariance = (means["scores/products"] - mean * of_scores) * replies / (replies - 1)
        results["validation_correlation"] = max(-1.0, min(1.0, covariance / (deviation * of_scores_deviation)))
    return results


def sample_deviation(mean_of_squares: float, mean: float, count: int) -> float:
    """The standard deviation of a sample of `count`, dividing by count - 1; 0 of a single value."""
    return math.sqrt(max(mean_of_squares - mean**2, 0.0) * count / max(count - 1, 1))


if __name__ == "__main__":
    run(main)
