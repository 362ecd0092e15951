"""The end of a stage that trained one model on a table: its weights, the last or the best, become the outs."""

from collections.abc import Mapping
from pathlib import Path

from stages.lib.compute.engine.base import Engine
from stages.lib.models.lora import Lora
from stages.lib.objectives.best_weights import BestWeights
from stages.lib.runs.training_run import TrainingRun
from stages.lib.settings.epochs import EpochSettings


def publish_kept(
    run: TrainingRun,
    engine: Engine,
    lora: Lora,
    best: BestWeights,
    results: Mapping[str, float],
    settings: EpochSettings,
    *,
    tokenizer_from: Path,
) -> None:
    """Publish model, metrics and curve, and the adapter where it is asked for.

    Args:
        results: of the metrics; the steps taken, which of them was kept, and the counts of parameters join them.
    """
    with engine.averaged():
        weights = engine.master_weights(lora.model)
        kept = best.choose(lambda: lora.trained(weights))
        steps = {"steps": engine.steps_taken, "stopped_early": int(engine.steps_taken < engine.total_steps)}
        run.publish_model(
            lora.model,
            run.processes.in_main(lambda: lora.merged(weights | kept.weights)) or {},
            {**results, **steps, "kept_step": kept.step, **lora.counts()},
            save_dtype=settings.save_dtype,
            tokenizer_from=tokenizer_from,
            build_others=lambda staged: lora.save_adapter(kept.weights, staged["model"], settings.save_dtype),
        )
