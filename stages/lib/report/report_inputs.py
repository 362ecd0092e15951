"""What the report is made from: metrics, curves and samples of one run, each checked, and that they belong together."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from reprlib import repr as quoted
from typing import Any, NamedTuple

from stages.lib.command.errors import StageError
from stages.lib.command.jsonl import read_json, read_jsonl
from stages.lib.data.prepared_rows import KINDS
from stages.lib.report.curve_tables import VALIDATION, CurveTable, curve_in
from stages.lib.report.number_formats import LARGEST, is_usable, number
from stages.lib.report.outcome import graded_prompts

SPLITS = ("train", "validation", "test")
SHOWN_SAMPLES = 8
STEPS = ("steps", "iterations")  # the key of a training stage's metrics that says how far it went
# Keys of metrics whose names end so are shares or counts; every other one is any number.
SHARES = ("accuracy", "accuracies", "_win_rate_vs_reference", "eos_rate", "distinct_1", "distinct_2")
SHARES += ("calibration_error", "confidence", "_share")
COUNTS = ("rows", "tokens", "prompts", "pairs", "replies", "rollouts", "iterations", "steps", "_step")
ENDS = ("_ci_low", "_ci_high")
OF_REWARDS = "validation_rewards_"  # and behind it the name of a reward, which a user chooses
# The metric that is the mean of a key over all samples, whose numbers are rounded to six decimals.
MEANS = {"kl": "kl_to_reference_mean", "length": "length_mean", "ended": "eos_rate", "gold": "gold_mean"}
SAMPLE_ROUNDING = 1e-6
CURVE_ROUNDING = 1e-6  # a curve has seven significant digits
ROUNDING = 1e-9  # of a float64 that some sums have gone into


class Named(NamedTuple):
    """What params.yaml names: all that the report may show."""

    kinds: tuple[str, ...]
    trained: dict[str, str]  # name of each model that is trained → the section that it stands in
    policies: tuple[str, ...]  # that are evaluated
    reference: str  # what they are compared with: one of them by its name, or a path
    scored: tuple[str, ...]  # of the policies: those whose samples a reward model has scored
    reward_models: tuple[str, ...]  # that are evaluated
    judge: str | None  # the folder of the reward model that has scored the samples
    sampled: tuple[str, ...] = ()  # rounds of rows made of a policy's own replies


class Metrics(dict[str, float]):
    """The numbers of one metrics file; asking for one that it lacks is a StageError that names file and key.

    Args:
        maker: the stage that writes it.
    """

    def __init__(self, path: Path, maker: str) -> None:
        super().__init__(flat_numbers(path, maker))
        self.path = path
        self.maker = maker

    def __missing__(self, key: str) -> float:
        raise StageError(f"{self.path}: '{key}' is missing; run {self.maker} again")


class Inputs(NamedTuple):
    """All that the report is made from."""

    named: Named
    data: Metrics
    tokens: dict[str, Metrics]
    training: dict[str, Metrics]
    curves: dict[str, CurveTable]
    evaluations: dict[str, Metrics]
    scores: dict[str, Metrics]
    reward_models: dict[str, Metrics]
    samples: dict[str, list[dict[str, Any]]]
    sampled: dict[str, Metrics]

    @property
    def measured(self) -> dict[str, dict[str, float]]:
        """All that is known of each policy: what was measured on it, and what a reward model thinks of its replies."""
        return {name: {**metrics, **self.scores.get(name, {})} for name, metrics in self.evaluations.items()}


def flat_numbers(path: Path, maker: str) -> dict[str, float]:
    """A metrics file: one JSON object of numbers, of which shares lie in 0 to 1 and counts are whole."""
    values = read_json(required(path, maker))
    if not isinstance(values, dict):
        raise StageError(f"{path}: expected a JSON object of numbers, found {type(values).__name__}; run {maker} again")
    for key, value in values.items():
        fits, expected = expectation(key)
        if not fits(value):
            raise StageError(f"{path}: '{key}' is {quoted(value)}, expected {expected}; run {maker} again")
    return values


def expectation(key: str) -> tuple[Callable[[Any], bool], str]:
    """What the value of a key of metrics must be: a test, and words for it.

    `<metric>/<source>` is as `<metric>`; `<kind>/<split>_rows`, also below a source's name, counts what its end says.
    """
    name, _, below = key.partition("/")
    name = below if name in KINDS or "/" in below else name
    if name.startswith(("mean_", OF_REWARDS)):
        return is_usable, A_NUMBER
    for end in ENDS:
        name = name.removesuffix(end)
    if name.endswith(SHARES):
        return is_share, "a share from 0 to 1"
    if name.endswith(COUNTS) or name == "dropped":
        return is_count, "a whole number, at least 0"
    return is_usable, A_NUMBER


def is_share(value: Any) -> bool:
    return is_usable(value) and -ROUNDING <= value <= 1 + ROUNDING


def is_count(value: Any) -> bool:
    return is_usable(value) and isinstance(value, int) and value >= 0


def required(path: Path, maker: str) -> Path:
    if not path.is_file():
        trouble = "is not a file" if os.path.lexists(path) else "does not exist"
        raise StageError(f"{path} {trouble}; the report needs it: run {maker} (or `dvc repro report`)")
    return path


def read_inputs(named: Named, metrics: Path, samples: Path, scores: Path) -> Inputs:
    """Read every file that the report is made from: of all that lies in the folders, what params.yaml names."""
    training = {
        name: Metrics(metrics / f"training/{name}.json", f"{stage}@{name}") for name, stage in named.trained.items()
    }

    def of_stage(stage: str, names: Iterable[str]) -> dict[str, Metrics]:
        return {name: Metrics(metrics / f"{stage}/{name}.json", f"{stage}@{name}") for name in names}

    evaluations, scored = of_stage("evaluate", named.policies), of_stage("score_samples", named.scored)
    sampled = read_samples(samples, evaluations)
    for name, of_reward in scored.items():
        add_scores(sampled[name], scores / f"{name}.jsonl", of_reward)
    return Inputs(
        named=named,
        data=Metrics(metrics / "prepare_data.json", "prepare_data"),
        tokens=of_stage("tokenize_data", named.kinds),
        training=training,
        curves={name: curve_of(metrics / f"curves/{name}.csv", training[name]) for name in named.trained},
        evaluations=evaluations,
        scores=scored,
        reward_models=of_stage("evaluate_rm", named.reward_models),
        samples={name: rows[:SHOWN_SAMPLES] for name, rows in sampled.items()},
        sampled=of_stage("sample_pairs", named.sampled),
    )


def curve_of(path: Path, metrics: Metrics) -> CurveTable:
    """The curve of a training stage, which must be of the run that its metrics are of.

    Raises:
        StageError: it ends at another step than the metrics say, or its validation loss at the step that was kept is
            another one.
    """
    curve = curve_in(path)
    other_run = f"so they are of two runs; run {metrics.maker} again"
    last = metrics[next((key for key in STEPS if key in metrics), STEPS[0])]
    if curve.steps[-1] != last:
        raise StageError(f"{path} ends at step {curve.steps[-1]}, and {metrics.path} says {number(last)}, {other_run}")
    losses = dict(zip(*curve.points(f"{VALIDATION}loss"), strict=True))
    if "kept_step" in metrics and "validation_loss" in metrics and losses:
        found = losses.get(int(metrics["kept_step"]))
        if found is None or not math.isclose(found, metrics["validation_loss"], rel_tol=CURVE_ROUNDING):
            raise StageError(
                f"{path} has validation loss {'nothing' if found is None else f'{found:.7g}'} at step "
                f"{number(metrics['kept_step'])}, and {metrics.path} says {metrics['validation_loss']:.7g}, {other_run}"
            )
    return curve


def read_samples(folder: Path, evaluations: Mapping[str, Metrics]) -> dict[str, list[dict[str, Any]]]:
    """The samples of each policy. All must be of the same prompts, and of the evaluation in the metrics."""
    samples: dict[str, list[dict[str, Any]]] = {}
    for policy, metrics in evaluations.items():
        path = required(folder / f"{policy}.jsonl", metrics.maker)
        rows = list(read_jsonl(path)) if "prompts" in metrics else []
        for line, row in enumerate(rows, start=1):
            check_sample(row, f"{path}, line {line}", policy)
        if rows:
            require_own_metrics(path, rows, metrics)
        samples[policy] = rows
    first = next(iter(samples), "")
    prompts = [sampled_prompt(row) for row in samples.get(first, [])]
    for policy, rows in samples.items():
        if [sampled_prompt(row) for row in rows] != prompts:
            raise StageError(
                f"{folder / policy}.jsonl is of other prompts than {folder / first}.jsonl; run evaluate@{first} and "
                f"evaluate@{policy} again"
            )
    return samples


def add_scores(samples: list[dict[str, Any]], path: Path, metrics: Metrics) -> None:
    """Put a reward model's scores beside the samples that it has scored.

    Raises:
        StageError: they are of other samples, or not those that the metrics were computed from.
    """
    rows = list(read_jsonl(required(path, metrics.maker)))
    again = f"run {metrics.maker} again"
    for line, row in enumerate(rows, start=1):
        if not (is_count(row.get("row")) and is_usable(row.get("score"))):
            raise StageError(f"{path}, line {line}: expected a row and a score, found {quoted(row)}; {again}")
    if [row["row"] for row in rows] != [row["row"] for row in samples]:
        raise StageError(f"{path} is of other samples than evaluate has made since; {again}")
    mean = math.fsum(row["score"] for row in rows) / len(rows)
    if not math.isclose(mean, metrics["reward_mean"], rel_tol=ROUNDING, abs_tol=SAMPLE_ROUNDING):
        raise StageError(f"{path}: mean score {mean:.7g}, and {metrics.path} has {metrics['reward_mean']:.7g}; {again}")
    for sample, row in zip(samples, rows, strict=True):
        sample["reward"], sample["reference_reward"] = row["score"], row.get("reference_score")


def check_sample(row: dict[str, Any], where: str, policy: str) -> None:
    for key, (fits, expected) in SAMPLE.items():
        if key in OPTIONAL and key not in row:
            continue
        if key not in row or not fits(row[key]):
            found = quoted(row[key]) if key in row else "missing"
            raise StageError(f"{where}: '{key}' is {found}, expected {expected}; run evaluate@{policy} again")


def is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list)
        and all(
            isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            for message in value
        )
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
    for key, name in MEANS.items():
        values = [row[key] for row in rows if key in row]
        if not values:
            continue
        mean = math.fsum(values) / len(values)
        if not math.isclose(mean, metrics[name], rel_tol=ROUNDING, abs_tol=SAMPLE_ROUNDING):
            raise StageError(f"{path}: mean {key} {mean:.7g}, and {metrics.path} has {metrics[name]:.7g}, {again}")


def sampled_prompt(row: dict[str, Any]) -> tuple[int, Any]:
    prompt = row["prompt"]
    return row["row"], prompt if isinstance(prompt, str) else [(part["role"], part["content"]) for part in prompt]


A_NUMBER = f"a finite number of at most {LARGEST:g}"
SAMPLE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "row": (is_count, "a whole number"),
    "prompt": (is_prompt, "a text, or a list of messages with role and content"),
    **dict.fromkeys(("response", "reference_response"), (is_text, "text")),
    "kl": (is_usable, A_NUMBER),
    "length": (is_count, "a whole number of tokens"),
    **dict.fromkeys(("ended", "reference_ended"), (is_truth_value, "true or false")),
    **dict.fromkeys(("gold", "reference_gold"), (is_usable, A_NUMBER)),
}
# Where the prompt has a gold utility; and where the policy is not the reference itself.
OPTIONAL = ("gold", "reference_gold", "kl", "reference_response", "reference_ended")
