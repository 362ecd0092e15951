"""The loop on a quadratic, in a real run with its checkpoints: every number of its curve worked out again."""

import csv
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stages.lib.command.errors import StageError
from stages.lib.command.params import build
from stages.lib.command.strict_yaml import load_yaml
from stages.lib.compute.batching import MicroBatching, SequenceBatch, rows_of_step, steps_in
from stages.lib.compute.engine.torch import TorchEngine
from stages.lib.compute.processes import Processes
from stages.lib.objectives.best_weights import BestWeights
from stages.lib.objectives.fit import fit
from stages.lib.objectives.objective import Mean, PassSums, Rows, summed
from stages.lib.runs.training_run import TrainingRun
from stages.lib.settings.declaration import block
from stages.lib.settings.epochs import BestBy, EarlyStopping, EpochSettings
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.runtime import Runtime
from tests.real_files import PROJECT
from tests.stages.tiny_pipeline import inside
from tests.tiny_models import CPU, batching

ALONE = Processes(0, 1, CPU)
RATE = 0.5
TRAIN = {"x": [1.0, -2.0, 3.0, 0.5, 4.0], "weight": [1, 5, 2, 1, 3]}
HELD_OUT = {"x": [0.5, 0.8], "weight": [1, 3]}  # nearer to w after 4 steps than after 6
COLUMNS = ("loss", "distance", "grad_norm", "learning_rate", "validation/loss")
SEED = 3
OPTIMIZER = OptimizerSettings(
    moments="float32",
    learning_rate=RATE,
    schedule="constant",
    warmup_ratio=0.0,
    min_learning_rate_ratio=1.0,
    weight_decay=0.0,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    max_grad_norm=1e6,
    ema_decay=None,
)


def settings_of(keep: str, **changed: Any) -> EpochSettings:
    """12 rows: 6 steps of 2, the third of which takes rows of two epochs."""
    defaults = build(EpochSettings, block(EpochSettings), "of a test")
    size = {"epochs": 2.4, "batch_size": 2, "eval_every": 4, "keep": keep, "optimizer": OPTIMIZER}
    return defaults.model_copy(update=size | changed)


SETTINGS = settings_of("best")


class Table:
    """A few columns."""

    def __init__(self, columns: dict[str, list]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["x"])

    def __getitem__(self, rows: Any) -> dict[str, list]:
        places = range(len(self))[rows] if isinstance(rows, slice) else rows
        return {name: [values[place] for place in places] for name, values in self.columns.items()}


class Point(nn.Module):
    """w, to be drawn towards every x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w - x


METRICS = {"loss": Mean("weight"), "distance": Mean("weight")}


class Quadratic:
    """Σ weight (w − x)² / Σ weight, one row a pass."""

    metrics = METRICS

    def __init__(self) -> None:
        self.batching: MicroBatching = batching(1)

    def batches(self, rows: Rows) -> Iterator[SequenceBatch]:
        return self.batching.masked([[0]] * len(rows["x"]), [[1]] * len(rows["x"]))

    def sums(self, module: Any, batch: SequenceBatch, rows: Rows) -> PassSums:
        x, weight = (torch.tensor([float(rows[name][row]) for row in batch.rows]) for name in ("x", "weight"))
        losses = weight * module(x) ** 2
        return PassSums(losses.sum(), summed(losses, weight * module(x).abs()))

    def denominators(self, rows: Rows) -> dict[str, int]:
        return {"weight": sum(rows["weight"])}

    def units(self, rows: Rows) -> int:
        return len(rows["x"])


def mean(w: float, rows: Rows, power: int) -> float:
    pairs = list(zip(rows["x"], rows["weight"], strict=True))
    return sum(weight * abs(w - x) ** power for x, weight in pairs) / sum(weight for _, weight in pairs)


def worked_out_again() -> tuple[list[dict[str, float]], list[float]]:
    """The rows of the curve, and w before and after each step, by AdamW's formula (arXiv 1711.05101)."""
    w, first, second, curve, points = 0.0, 0.0, 0.0, [], [0.0]
    total = steps_in(5, SETTINGS.batch_size, SETTINGS.epochs)
    for step in range(total):
        rows = Table(TRAIN)[rows_of_step(step, 5, SETTINGS.batch_size, SETTINGS.epochs, SEED)]
        pairs = list(zip(rows["x"], rows["weight"], strict=True))
        gradient = sum(2 * weight * (w - x) for x, weight in pairs) / sum(weight for _, weight in pairs)
        row = {"loss": mean(w, rows, 2), "distance": mean(w, rows, 1), "grad_norm": abs(gradient)}
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        corrected = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.95 ** (step + 1))
        w -= RATE * corrected[0] / (math.sqrt(corrected[1]) + 1e-8)
        if step + 1 in (4, total):
            row["validation/loss"] = mean(w, Table(HELD_OUT)[:], 2)
        curve.append(row | {"learning_rate": RATE})
        points.append(w)
    return curve, points


class Cut(BaseException):
    """Stands for a kill."""


@contextmanager
def new_run(folder: Path) -> Iterator[TrainingRun]:
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    (folder / "rows/rows.txt").write_text("rows\n")
    values = load_yaml(PROJECT / "runtime.yaml")["default"] | {"checkpoint_seconds": 0.0}
    with inside(folder):
        outs = {"curve": Path("curve.csv")}
        runtime = Runtime(**values)
        with TrainingRun("train_sft", {}, [Path("rows")], outs, COLUMNS, runtime, ALONE) as run:
            yield run


def fitted(
    run: TrainingRun,
    settings: EpochSettings = SETTINGS,
    train: dict = TRAIN,
    held_out: dict = HELD_OUT,
    after_step: Callable[[int], None] = lambda _: None,
    after_evaluation: Callable[[int], None] = lambda _: None,
) -> tuple[BestWeights, Point]:
    module = Point()
    total = steps_in(5, settings.batch_size, settings.epochs)
    engine = TorchEngine(module, settings.optimizer, total, run.runtime, ALONE)
    tables = (Table(train), Table(held_out))
    weights = engine.master_weights
    words = {"weights": lambda: weights(module), "shown": ("loss",), "after_step": after_step}
    words |= {"after_evaluation": after_evaluation}
    best = fit(run, engine, Quadratic(), *tables, settings, SEED, **words)
    run.publish(lambda _: None)
    return best, module


def curve_of(folder: Path) -> list[dict[str, float]]:
    with (folder / "curve.csv").open() as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def test_it_does_what_the_formulas_say(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with new_run(tmp_path) as run:
        best, module = fitted(run)
    curve, points = worked_out_again()
    assert float(module.w.detach()) == pytest.approx(points[-1], rel=1e-5)
    found = curve_of(tmp_path)
    assert [row.pop("step") for row in found] == [1, 2, 3, 4, 5, 6]
    assert found == [pytest.approx(row, rel=1e-5) for row in curve]  # there is no column validation/distance
    # The step with the lower held-out loss is kept, with all metrics of its evaluation.
    assert curve[3]["validation/loss"] < curve[5]["validation/loss"]
    assert best.step == 4
    held_out = {"loss": curve[3]["validation/loss"], "distance": mean(points[4], Table(HELD_OUT)[:], 1)}
    assert best.results == pytest.approx(held_out, rel=1e-5)
    assert float(best.weights["w"]) == pytest.approx(points[4], rel=1e-5)
    shown = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert shown
    assert not any("distance" in line for line in shown)


@pytest.mark.parametrize("last", [0, 3, 5])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    with new_run(tmp_path / "whole") as run:
        whole, module = fitted(run)
    record = TrainingRun.record

    def cut(self: TrainingRun, step: int, *words: Any) -> None:
        record(self, step, *words)
        if step == last:
            raise Cut

    with monkeypatch.context() as patch, new_run(tmp_path / "cut") as run:
        patch.setattr(TrainingRun, "record", cut)
        with pytest.raises(Cut):
            fitted(run)
    with new_run(tmp_path / "cut") as run:
        best, other = fitted(run)
    assert (tmp_path / "cut/curve.csv").read_bytes() == (tmp_path / "whole/curve.csv").read_bytes()
    assert float(other.w.detach()) == float(module.w.detach())
    assert (best.step, best.results, best.weights) == (whole.step, whole.results, whole.weights)


# Training draws w from 0 upwards: away from -5, and for all its steps nearer to 20.
AWAY, TOWARDS = ({"x": [x], "weight": [1]} for x in (-5.0, 20.0))
DECAYING = OPTIMIZER.model_copy(update={"schedule": "linear", "min_learning_rate_ratio": 0.1})


def impatient(keep: str, patience: int = 2, **changed: Any) -> EpochSettings:
    stopping = EarlyStopping(patience=patience, min_delta=0.0)
    return settings_of(keep, eval_every=1, early_stopping=stopping, optimizer=DECAYING, **changed)


@pytest.mark.parametrize(("keep", "kept"), [("best", 1), ("last", 3)])
def test_it_stops_once_the_held_out_rows_lose_whatever_the_train_rows_do(
    tmp_path: Path, capsys: pytest.CaptureFixture, keep: str, kept: int
) -> None:
    with new_run(tmp_path / "whole") as run:
        fitted(run, settings_of(keep, eval_every=1, optimizer=DECAYING), held_out=AWAY)
    told: list[int] = []
    with new_run(tmp_path / "stopped") as run:
        best, module = fitted(run, impatient(keep), held_out=AWAY, after_step=told.append)
    assert (
        "train_sft: stops at step 3 of 6: validation/loss has not improved in 2 evaluations" in capsys.readouterr().out
    )
    # The first evaluation is the best, and two that are worse come after it. The rates are those of six steps.
    found = curve_of(tmp_path / "stopped")
    assert found == curve_of(tmp_path / "whole")[:3]
    assert [row["learning_rate"] for row in found] == pytest.approx([RATE * (1 - 0.9 * step / 5) for step in range(3)])
    assert best.choose(lambda: {"w": module.w}).step == kept
    assert told == ([0, 1, 2] if keep == "best" else [0, 1])


def test_it_does_not_stop_while_the_held_out_rows_gain_though_the_train_rows_lose(tmp_path: Path) -> None:
    """Train losses of single rows jump up and down, and all but three of the six steps see a higher one."""
    with new_run(tmp_path) as run:
        best, _ = fitted(run, impatient("best", patience=1, epochs=1.2, batch_size=1), held_out=TOWARDS)
    found = curve_of(tmp_path)
    assert len(found) == 6
    assert any(later["loss"] > row["loss"] for row, later in itertools.pairwise(found))
    assert best.step == 6


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_run_that_stops_early_does_so_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    with new_run(tmp_path / "whole") as run:
        whole, _ = fitted(run, impatient("best"), held_out=AWAY)
    save = TrainingRun._save

    def cut(self: TrainingRun, step: int, parts: Any) -> None:
        save(self, step, parts)
        if step == last + 1:
            raise Cut

    with monkeypatch.context() as patch, new_run(tmp_path / "cut") as run:
        patch.setattr(TrainingRun, "_save", cut)
        with pytest.raises(Cut):
            fitted(run, impatient("best"), held_out=AWAY)
    with new_run(tmp_path / "cut") as run:
        best, _ = fitted(run, impatient("best"), held_out=AWAY)
    assert (tmp_path / "cut/curve.csv").read_bytes() == (tmp_path / "whole/curve.csv").read_bytes()
    assert (best.step, best.results, best.weights) == (whole.step, whole.results, whole.weights)


def test_the_best_goes_by_the_metric_that_is_named(tmp_path: Path) -> None:
    by = BestBy(metric="distance", better="higher")
    with new_run(tmp_path) as run:
        best, _ = fitted(run, settings_of("best", eval_every=1, best_by=by), held_out=AWAY)
    _, points = worked_out_again()
    assert best.step == 1 + max(range(6), key=lambda step: points[step + 1])
    assert best.results["distance"] == pytest.approx(max(points[1:]) + 5, rel=1e-5)


def test_a_metric_that_there_is_not_is_refused_before_the_first_step(tmp_path: Path) -> None:
    settings = settings_of("best", best_by=BestBy(metric="distances", better="lower"))
    expected = (
        r"^params.yaml: train_sft.best_by.metric: there is no metric 'distances' here; did you mean 'distance'\?; "
        r"there are loss, distance$"
    )
    with new_run(tmp_path) as run, pytest.raises(StageError, match=expected):
        fitted(run, settings)
    assert not list(tmp_path.rglob("curve.csv"))


def test_a_loss_that_is_no_number_ends_it_before_its_step(tmp_path: Path) -> None:
    broken = {**TRAIN, "x": [math.nan] * 5}
    with new_run(tmp_path) as run, pytest.raises(StageError, match=r"^loss is nan at optimizer step 1: "):
        fitted(run, train=broken)


def test_it_tells_of_each_evaluation(tmp_path: Path) -> None:
    told: list[int] = []
    with new_run(tmp_path) as run:
        fitted(run, after_evaluation=told.append)
    assert told == [3, 5]


def test_with_last_nothing_is_copied(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        best, _ = fitted(run, settings_of("last"))
    assert best.step == 6
    assert best.weights is None


@pytest.mark.parametrize(("keep", "told"), [("last", [0, 1, 2, 3, 4]), ("best", [0, 1, 2, 3, 4, 5])])
def test_it_tells_of_each_step_whose_weights_are_not_published_as_the_last(
    keep: str, told: list[int], tmp_path: Path
) -> None:
    found: list[int] = []
    with new_run(tmp_path) as run:
        fitted(run, settings_of(keep), after_step=found.append)
    assert found == told
