"""The loop of every stage that trains on a fixed table: take steps, evaluate, stop early, keep the last or the best.

best = fit(run, engine, objective, train, held_out, settings, seed, weights=…, shown=("loss",), after_step=…)
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

from stages.lib.command.errors import StageError
from stages.lib.compute.batching import is_due, rows_of_step
from stages.lib.compute.engine.base import Engine, require_finite
from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.objectives.best_weights import BestWeights, Patience, cost_of
from stages.lib.objectives.objective import KeepsState, Objective, Rows
from stages.lib.settings.epochs import BestBy, EpochSettings, require_compared_metric


class Table(Protocol):
    """Rows by number, as columns."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Rows:
        """The columns of a list or slice of rows."""


class Run(Protocol):
    """The run of a stage: what remains to be done of it after a kill, and where its curve goes."""

    @property
    def stage(self) -> str:
        """As <section>@<entry>."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the curve."""

    def steps(
        self,
        total: int,
        *,
        engine: Engine,
        best: BestWeights,
        patience: Patience,
        budget: MemoryBudget,
        **objective: KeepsState,
    ) -> Iterator[int]:
        """The steps that are left, 0-based. The parts go on from a checkpoint, and into the next ones."""

    def say(self, text: str) -> None:
        """Print a line, once."""

    def record(self, step: int, units: int, metrics: Mapping[str, float], shown: tuple[str, ...]) -> None:
        """Add the row of a finished step to the curve, and show some of it."""


def fit(
    run: Run,
    engine: Engine,
    objective: Objective,
    train: Table,
    held_out: Table,
    settings: EpochSettings,
    seed: int,
    *,
    weights: Callable[[], dict[str, torch.Tensor]],
    shown: tuple[str, ...],
    after_step: Callable[[int], None],
    after_evaluation: Callable[[int], None] = lambda _: None,
    parts: Mapping[str, Any] | None = None,
) -> BestWeights:
    """Take the engine's steps on `train`; every `settings.eval_every` of them, and after the last, evaluate.

    The curve gets each metric of the step with a column, and of the held-out rows those with a column
    validation/<metric>. Once an evaluation has exhausted the patience of `settings.early_stopping`, no further step is
    taken.

    Args:
        seed: of the order of rows.
        weights: what training changes, as it stands; called within `engine.averaged()`.
        shown: names of what a progress line shows.
        after_step: is told of each finished step (0-based) before its checkpoint, to keep its model; not of the last,
            unless it is the best that will be published.
        after_evaluation: is told of the step (0-based) that was evaluated, within `engine.averaged()`.
        parts: what else goes on from a checkpoint, and into the next ones, by name.
    Returns:
        The weights to publish, if they are not the last ones, and what the evaluation of those published has found.
    Raises:
        StageError: the metric to compare evaluations by is none of the objective's; a loss, this metric or the norm of
            a gradient is not a finite number.
    """
    require_compared_metric(settings.best_by, objective.metrics, run.stage.replace("@", "."))
    best = BestWeights(settings.keep, settings.best_by, is_main=engine.processes.is_main)
    patience = Patience(settings.early_stopping)
    total, budget = engine.total_steps, objective.batching.budget
    kept = {"objective": objective} if isinstance(objective, KeepsState) else {}
    kept |= parts or {}
    for step in run.steps(total, engine=engine, best=best, patience=patience, budget=budget, **kept):
        if patience.is_over:
            continue
        rows = train[rows_of_step(step, len(train), settings.batch_size, settings.epochs, seed)]
        means = global_means(objective, engine, rows, train=True)
        row = {"learning_rate": engine.learning_rate} | {name: means[name] for name in means if name in run.columns}
        require_finite(row["loss"], "loss", step)
        row["grad_norm"] = engine.step()
        if is_due(step + 1, settings.eval_every, total):
            with engine.averaged():
                results = global_means(objective, engine, held_out[:], train=False)
                require_comparable(results, settings.best_by, step)
                best.offer(results, step + 1, weights)
                after_evaluation(step)
            patience.offer(cost_of(results, settings.best_by))
            of_held_out = {f"validation/{name}": value for name, value in results.items()}
            row |= {name: value for name, value in of_held_out.items() if name in run.columns}
        run.record(step, objective.units(rows), row, shown)
        if patience.is_over:
            run.say(
                f"{run.stage}: stops at step {step + 1} of {total}: validation/{settings.best_by.metric} has not "
                f"improved in {patience.misses} evaluations"
            )
        is_last = step + 1 == total or patience.is_over
        if not is_last or settings.keep == "best":
            after_step(step)
    return best


def require_comparable(results: Mapping[str, float], best_by: BestBy, step: int) -> None:
    """Raise StageError if an evaluation found no finite number for the loss or the metric to compare by."""
    for name in ("loss", best_by.metric):
        if name not in results:
            raise StageError(f"best_by.metric: the validation rows have nothing that {name} is a mean over")
        require_finite(results[name], f"validation {name}", step)


def global_means(objective: Objective, engine: Any, rows: Rows, *, train: bool) -> dict[str, float]:
    """Each metric's sum over rows and processes, over its denominator; with `train`, add the gradient of the loss.

    A metric whose denominator is 0 in these rows, as a mean over kept replies where none is kept, is left out.

    Args:
        engine: without `train`, the module alone will do.
        rows: the same in all processes, which share them out.
    """
    metrics, denominators = objective.metrics, objective.denominators(rows)
    denominator = denominators[metrics["loss"].over]

    def own_sums() -> torch.Tensor:
        total = torch.zeros(len(metrics), dtype=torch.float64)
        for batch in objective.batches(rows):
            with torch.set_grad_enabled(train):
                sums = objective.sums(engine, batch, rows)
                if train:
                    engine.backward(sums.loss / denominator)
            total += sums.metrics
        return total

    batching = objective.batching
    totals = batching.processes.sum(batching.budget.attempt(own_sums, engine).tolist())
    return {
        name: mean.shown_as(total / denominators[mean.over])
        for (name, mean), total in zip(metrics.items(), totals, strict=True)
        if denominators[mean.over]
    }
