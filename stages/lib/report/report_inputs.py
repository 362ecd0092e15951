"""What the report is made from: metrics, curves and samples of one run, each checked, and that they belong together."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import repr as quoted
from typing import Any, NamedTuple

from stages.lib.command.errors import StageError
from stages.lib.command.jsonl import read_json, read_jsonl
from stages.lib.report.curve_tables import EVAL, CurveTable, curve_in
from stages.lib.report.number_formats import LARGEST, is_usable, number
from stages.lib.report.outcome import BASELINE, graded_prompts

ALWAYS_TRAINED = ("train_sft", "train_rm")
KINDS = ("sft", "preference", "prompts")
SPLITS = ("train", "eval")
SHOWN_SAMPLES = 8
STEPS = ("steps", "iterations")  # the key of a training stage's metrics that says how far it went
# Keys of metrics whose names end so are shares or counts; every other one is any number.
SHARES = ("accuracy", "accuracies", "_win_rate_vs_sft", "eos_rate", "distinct_1", "distinct_2", "calibration_error")
COUNTS = ("rows", "tokens", "prompts", "pairs", "rollouts", "iterations", "steps", "_step")
ENDS = ("_ci_low", "_ci_high")
OF_GOLD = ("gold", "sft_gold")  # where the prompt has a gold utility
# The metric that is the mean of a key over all samples, whose numbers are rounded to six decimals.
MEANS = {"reward": "reward_mean", "kl": "kl_to_sft_mean", "length": "length_mean", "ended": "eos_rate"}
MEANS_OF_GOLD = {"gold": "gold_mean"}
SAMPLE_ROUNDING = 1e-6
CURVE_ROUNDING = 1e-6  # a curve has seven significant digits
ROUNDING = 1e-9  # of a float64 that some sums have gone into


class Metrics(dict[str, float]):
    """The numbers of one metrics file; asking for one that it lacks is a StageError that names file and key."""

    def __init__(self, path: Path) -> None:
        super().__init__(flat_numbers(path))
        self.path = path

    def __missing__(self, key: str) -> float:
        raise StageError(f"{self.path}: '{key}' is missing; {written_by(self.path)}")


class Inputs(NamedTuple):
    """All that the report is made from."""

    data: Metrics
    tokens: dict[str, Metrics]
    training: dict[str, Metrics]
    curves: dict[str, CurveTable]
    evaluations: dict[str, Metrics]
    samples: dict[str, list[dict[str, Any]]]
    absent: list[str]  # policies that were trained, but not evaluated


def flat_numbers(path: Path) -> dict[str, float]:
    """A metrics file: one JSON object of numbers, of which shares lie in 0 to 1 and counts are whole."""
    values = read_json(required(path))
    if not isinstance(values, dict):
        raise StageError(
            f"{path}: expected a JSON object of numbers, found {type(values).__name__}; {written_by(path)}"
        )
    for key, value in values.items():
        fits, expected = expectation(key)
        if not fits(value):
            raise StageError(f"{path}: '{key}' is {quoted(value)}, expected {expected}; {written_by(path)}")
    return values


def expectation(key: str) -> tuple[Callable[[Any], bool], str]:
    """What the value of a key of metrics must be: a test, and words for it."""
    name = key
    for end in ENDS:
        name = name.removesuffix(end)
    if name.endswith(SHARES):
        return is_share, "a share from 0 to 1"
    if name.endswith(COUNTS) or name.startswith("dropped/"):
        return is_count, "a whole number, at least 0"
    return is_usable, A_NUMBER


def is_share(value: Any) -> bool:
    return is_usable(value) and -ROUNDING <= value <= 1 + ROUNDING


def is_count(value: Any) -> bool:
    return is_usable(value) and isinstance(value, int) and value >= 0


def written_by(path: Path) -> str:
    """What to do about a file of metrics, a curve or samples that is not usable."""
    stage = f"{path.parent.name}@{path.stem}" if path.parent.name in ("evaluate", "tokenize_data") else path.stem
    return f"run {stage} again"


def required(path: Path) -> Path:
    if not path.is_file():
        trouble = "is not a file" if os.path.lexists(path) else "does not exist"
        raise StageError(f"{path} {trouble}; the report needs it: run the stage that writes it (`dvc repro report`)")
    return path


def read_inputs(metrics: Path, samples: Path) -> Inputs:
    """Read every file that the report is made from: of the policies, those that were evaluated."""
    for folder in (metrics, metrics / "evaluate"):
        if os.path.lexists(folder) and not folder.is_dir():
            raise StageError(f"{folder} is not a folder; move it away and run the stage evaluate")
    evaluated = names_in(metrics / "evaluate", "")
    if not evaluated:
        raise StageError(f"{metrics / 'evaluate'} holds the evaluation of no policy; run the stage evaluate")
    trained = [*ALWAYS_TRAINED, *(f"train_{policy}" for policy in evaluated if policy != BASELINE)]
    evaluations = {policy: Metrics(metrics / f"evaluate/{policy}.json") for policy in evaluated}
    training = {stage: Metrics(metrics / f"{stage}.json") for stage in trained}
    return Inputs(
        data=Metrics(metrics / "prepare_data.json"),
        tokens={kind: Metrics(metrics / f"tokenize_data/{kind}.json") for kind in KINDS},
        training=training,
        curves={stage: curve_of(metrics / f"curves/{stage}.csv", training[stage]) for stage in trained},
        evaluations=evaluations,
        samples=read_samples(samples, evaluations),
        absent=[policy for policy in names_in(metrics, "train_") if policy not in (*evaluated, "rm")],
    )


def names_in(folder: Path, prefix: str) -> list[str]:
    """What the metrics files of a folder are named for, after `prefix`: the baseline first."""
    names = {path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}[!.]*.json")}
    return sorted(names, key=lambda name: (name != BASELINE, name))


def curve_of(path: Path, metrics: Metrics) -> CurveTable:
    """The curve of a training stage, which must be of the run that its metrics are of.

    Raises:
        StageError: it ends at another step than the metrics say, or its held-out loss at the step that was kept is
            another one.
    """
    curve = curve_in(path)
    other_run = f"so they are of two runs; run {path.stem} again"
    last = metrics[next((key for key in STEPS if key in metrics), STEPS[0])]
    if curve.steps[-1] != last:
        raise StageError(f"{path} ends at step {curve.steps[-1]}, and {metrics.path} says {number(last)}, {other_run}")
    losses = dict(zip(*curve.points(f"{EVAL}loss"), strict=True))
    if "kept_step" in metrics and "eval_loss" in metrics and losses:
        found = losses.get(int(metrics["kept_step"]))
        if found is None or not math.isclose(found, metrics["eval_loss"], rel_tol=CURVE_ROUNDING):
            raise StageError(
                f"{path} has held-out loss {'nothing' if found is None else f'{found:.7g}'} at step "
                f"{number(metrics['kept_step'])}, and {metrics.path} says {metrics['eval_loss']:.7g}, {other_run}"
            )
    return curve


def read_samples(folder: Path, evaluations: Mapping[str, Metrics]) -> dict[str, list[dict[str, Any]]]:
    """The first samples of each policy. All must be of the same prompts, and of the evaluation in the metrics."""
    samples: dict[str, list[dict[str, Any]]] = {}
    for policy, metrics in evaluations.items():
        path = folder / f"{policy}.jsonl"
        rows = list(read_jsonl(required(path)))
        for line, row in enumerate(rows, start=1):
            check_sample(row, f"{path}, line {line}", policy)
        require_own_metrics(path, rows, metrics)
        samples[policy] = rows
    first = next(iter(samples))
    prompts = [sampled_prompt(row) for row in samples[first]]
    for policy, rows in samples.items():
        if [sampled_prompt(row) for row in rows] != prompts:
            raise StageError(
                f"{folder / policy}.jsonl is of other prompts than {folder / first}.jsonl; run evaluate@{first} and "
                f"evaluate@{policy} again"
            )
    return {policy: rows[:SHOWN_SAMPLES] for policy, rows in samples.items()}


def check_sample(row: dict[str, Any], where: str, policy: str) -> None:
    for key, (fits, expected) in SAMPLE.items():
        if key in OF_GOLD and key not in row:
            continue
        if key not in row or not fits(row[key]):
            found = quoted(row[key]) if key in row else "missing"
            raise StageError(f"{where}: '{key}' is {found}, expected {expected}; run evaluate@{policy} again")


def is_prompt(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in value
    )


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_truth_value(value: Any) -> bool:
    return isinstance(value, bool)


def require_own_metrics(path: Path, rows: list[dict[str, Any]], metrics: Metrics) -> None:
    """Raise StageError if the samples are not those that the metrics were computed from."""
    again = f"so they are of two evaluations; run evaluate@{path.stem} again"
    if len(rows) != metrics["prompts"]:
        raise StageError(
            f"{path} has {len(rows)} rows, and {metrics.path} counts {number(metrics['prompts'])} prompts, {again}"
        )
    graded, expected = sum("gold" in row for row in rows), graded_prompts(metrics)
    if graded != expected:
        raise StageError(
            f"{path} has gold utilities in {graded} rows, and {metrics.path} of {number(expected)} prompts, {again}"
        )
    for key, name in (MEANS | (MEANS_OF_GOLD if graded else {})).items():
        values = [row[key] for row in rows if key in row]
        mean = math.fsum(values) / len(values)
        if not math.isclose(mean, metrics[name], rel_tol=ROUNDING, abs_tol=SAMPLE_ROUNDING):
            raise StageError(f"{path}: mean {key} {mean:.7g}, and {metrics.path} has {metrics[name]:.7g}, {again}")


def sampled_prompt(row: dict[str, Any]) -> tuple[int, list[tuple[str, str]]]:
    return row["row"], [(message["role"], message["content"]) for message in row["prompt"]]


A_NUMBER = f"a finite number of at most {LARGEST:g}"
SAMPLE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "row": (is_count, "a whole number"),
    "prompt": (is_prompt, "a list of messages with role and content"),
    **dict.fromkeys(("response", "sft_response"), (is_text, "text")),
    **dict.fromkeys(("reward", "kl", "sft_reward"), (is_usable, A_NUMBER)),
    "length": (is_count, "a whole number of tokens"),
    "ended": (is_truth_value, "true or false"),
    **dict.fromkeys(OF_GOLD, (is_usable, A_NUMBER)),
}
