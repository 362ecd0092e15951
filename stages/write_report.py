"""One self-contained HTML page on what a run came to: outcome, policies, reward model, data, curves, samples.

    python -m stages.write_report --metrics metrics --samples data/samples --out metrics/report.html

A policy is in the report if METRICS holds its evaluation. The page needs no network and no script; what models and data
say is escaped; the same metrics give the same bytes.
"""

import json
import math
import time
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from stages.lib.curve_tables import read_curve, training_and_evaluation
from stages.lib.errors import StageError, run
from stages.lib.figures import COLOURS, Line, line_figure
from stages.lib.hashing import dvc_hashes
from stages.lib.jsonl import read_jsonl
from stages.lib.number_formats import decimal, number, percent, signed
from stages.lib.outcome import BASELINE, has_gold, outcome, shown
from stages.lib.outputs import written_whole
from stages.lib.pages import render_page, write_page
from stages.lib.run_log import log_run

POLICIES = (BASELINE, "dpo", "ppo")
ALWAYS_TRAINED = ("train_sft", "train_rm")
KINDS = ("sft", "preference", "prompts")
SPLITS = ("train", "eval")
SHOWN_SAMPLES = 8
# The curves to see at once; the others of a stage are folded away.
FIRST_CURVES = (
    *("loss", "accuracy", "rewards/accuracies", "rewards/margins"),
    *("objective/scores", "objective/kl", "objective/rlhf_reward", "policy/entropy"),
    *("response/length", "response/eos_rate"),
)
NUMBER = int | float
SAMPLE = {
    **{"row": int, "prompt": list, "response": str, "reward": NUMBER, "kl": NUMBER, "length": NUMBER, "ended": bool},
    **{"sft_response": str, "sft_reward": NUMBER},
}
NOTHING = "\N{EN DASH}"


class Metrics(dict[str, float]):
    """The numbers of one metrics file; asking for one that it lacks is a StageError that names file and key."""

    def __init__(self, path: Path) -> None:
        super().__init__(flat_numbers(path))
        self.path = path

    def __missing__(self, key: str) -> float:
        raise StageError(f"{self.path}: '{key}' is missing; run the stage that writes this file again")


class Cell(NamedTuple):
    """A number of a table, with what stands in small print below it."""

    value: str
    small: str = ""


class Row(NamedTuple):
    name: str
    cells: list[Cell]


class Inputs(NamedTuple):
    """All that the report is made from."""

    data: Metrics
    tokens: dict[str, Metrics]
    training: dict[str, Metrics]
    curves: dict[str, Any]
    evaluations: dict[str, Metrics]
    samples: dict[str, list[dict[str, Any]]]


def flat_numbers(path: Path) -> dict[str, float]:
    """A metrics file: one JSON object of finite numbers."""
    try:
        values = json.loads(required(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StageError(f"{path}: not valid JSON ({error}); run the stage that writes it again") from None
    if not isinstance(values, dict):
        raise StageError(f"{path}: expected a JSON object of numbers, found {type(values).__name__}")
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise StageError(f"{path}: '{key}' is {value!r}, expected a finite number")
    return values


def required(path: Path) -> Path:
    if not path.is_file():
        raise StageError(
            f"{path} does not exist; the report needs it: run the stage that writes it (`dvc repro report`)"
        )
    return path


def read_inputs(metrics: Path, samples: Path) -> Inputs:
    """Read every file that the report is made from: of the policies, those that were evaluated."""
    evaluated = [policy for policy in POLICIES if (metrics / f"evaluate/{policy}.json").exists()]
    if not evaluated:
        raise StageError(f"{metrics / 'evaluate'} holds the evaluation of no policy: {', '.join(POLICIES)}")
    trained = [*ALWAYS_TRAINED, *(f"train_{policy}" for policy in evaluated if policy != BASELINE)]
    return Inputs(
        data=Metrics(metrics / "prepare_data.json"),
        tokens={kind: Metrics(metrics / f"tokenize/{kind}.json") for kind in KINDS},
        training={stage: Metrics(metrics / f"{stage}.json") for stage in trained},
        curves={stage: curve_of(metrics / f"curves/{stage}.csv") for stage in trained},
        evaluations={policy: Metrics(metrics / f"evaluate/{policy}.json") for policy in evaluated},
        samples=read_samples({policy: samples / f"{policy}.jsonl" for policy in evaluated}),
    )


def curve_of(path: Path) -> Any:
    return read_curve(required(path).read_text(encoding="utf-8", errors="replace"), str(path))


def read_samples(files: Mapping[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """The first samples of each policy, which must be of the same prompts."""
    samples = {policy: list(islice(read_jsonl(path), SHOWN_SAMPLES)) for policy, path in files.items()}
    first = next(iter(samples))
    for policy, path in files.items():
        for line, row in enumerate(samples[policy], start=1):
            check_sample(row, f"{path}, line {line}")
        if [prompt_of(row) for row in samples[policy]] != [prompt_of(row) for row in samples[first]]:
            raise StageError(f"{path} is of other prompts than {files[first]}; run the stage evaluate again")
    return samples


def check_sample(row: dict[str, Any], where: str) -> None:
    for key, kind in SAMPLE.items():
        if not isinstance(row.get(key), kind):
            found = repr(row[key]) if key in row else "nothing"
            raise StageError(f"{where}: unusable '{key}', found {found}; run the stage evaluate again")


def prompt_of(row: dict[str, Any]) -> tuple[Any, Any]:
    return row["row"], row["prompt"]


def policies_table(evaluations: Mapping[str, Metrics]) -> dict[str, Any]:
    gold = any(has_gold(metrics) for metrics in evaluations.values())
    measure = "gold" if gold else "reward"
    columns = {
        "reward": lambda metrics: with_difference(metrics, "reward"),
        **({"gold utility": lambda metrics: with_difference(metrics, "gold")} if gold else {}),
        f"win rate by {measure}": lambda metrics: share(metrics, f"{measure}_win_rate_vs_sft"),
        "KL from SFT, nats": kl_from_sft,
        "ends with EOS": lambda metrics: Cell(percent(metrics["eos_rate"])),
        "length, tokens": lambda metrics: Cell(decimal(metrics["length_mean"], 1)),
        "distinct-1": lambda metrics: Cell(decimal(metrics["distinct_1"], 3)),
        "distinct-2": lambda metrics: Cell(decimal(metrics["distinct_2"], 3)),
        "preference accuracy": lambda metrics: share(metrics, "preference_accuracy"),
    }
    rows = [Row(shown(policy), [cell(metrics) for cell in columns.values()]) for policy, metrics in evaluations.items()]
    absent = [shown(policy) for policy in POLICIES if policy not in evaluations]
    return {"head": ["", *columns], "rows": rows, "absent": absent}


def with_difference(metrics: Metrics, measure: str) -> Cell:
    """The mean of a measure, and below it the difference from SFT; SFT itself has none."""
    if f"{measure}_mean" not in metrics and measure == "gold":
        return Cell(NOTHING)
    mean = decimal(metrics[f"{measure}_mean"])
    if metrics.path.stem == BASELINE:
        return Cell(mean)
    difference, low, high = (signed(metrics[f"{measure}_minus_sft_{part}"]) for part in ("mean", "ci_low", "ci_high"))
    return Cell(mean, f"{difference} ({low} to {high})")


def kl_from_sft(metrics: Metrics) -> Cell:
    if metrics.path.stem == BASELINE:
        return Cell(decimal(metrics["kl_to_sft_mean"]))
    low, high = (decimal(metrics[f"kl_to_sft_ci_{end}"]) for end in ("low", "high"))
    return Cell(decimal(metrics["kl_to_sft_mean"]), f"{low} to {high}")


def share(metrics: Metrics, key: str) -> Cell:
    """A share with its interval. SFT against itself says nothing, and is left out."""
    if key not in metrics or metrics.path.stem == BASELINE:
        return Cell(NOTHING)
    low, high = (percent(metrics[f"{key}_ci_{end}"]) for end in ("low", "high"))
    return Cell(percent(metrics[key]), f"{low} to {high}")


def reward_model_table(inputs: Inputs) -> dict[str, Any]:
    metrics = inputs.training["train_rm"]
    evaluation = next(iter(inputs.evaluations.values()))
    low, high = (percent(metrics[f"eval_accuracy_ci_{end}"]) for end in ("low", "high"))
    bayes = inputs.data.get("bayes_accuracy")
    cells = {
        "held-out accuracy": Cell(percent(metrics["eval_accuracy"]), f"{low} to {high}"),
        "Bayes accuracy": Cell(NOTHING, "not known") if bayes is None else Cell(percent(bayes)),
        "held-out loss": Cell(decimal(metrics["eval_loss"], 4)),
        "calibration error": Cell(decimal(evaluation["rm_calibration_error"], 3)),
    }
    return {"head": ["", *cells], "rows": [Row("Reward model", list(cells.values()))]}


def data_table(inputs: Inputs) -> dict[str, Any]:
    head = ["", *(f"{what}, {split}" for what in ("rows prepared", "rows used", "tokens") for split in SPLITS)]
    rows = []
    for kind, tokens in inputs.tokens.items():
        counts = [inputs.data[f"{kind}/{split}_rows"] for split in SPLITS]
        counts += [tokens[f"{split}_{what}"] for what in ("rows", "tokens") for split in SPLITS]
        rows.append(Row(kind, [Cell(number(count)) for count in counts]))
    raw_rows = number(inputs.data["raw_rows"]) if "raw_rows" in inputs.data else ""
    return {"head": head, "rows": rows, "raw_rows": raw_rows}


def dropped_table(inputs: Inputs) -> dict[str, Any]:
    """Rows dropped, by the stage that dropped them and its reason."""
    stages = {"prepare_data": inputs.data, **{f"tokenize {kind}": metrics for kind, metrics in inputs.tokens.items()}}
    rows = [
        Row(f"{stage}: {key.removeprefix('dropped/').replace('_', ' ')}", [Cell(number(count))])
        for stage, metrics in stages.items()
        for key, count in sorted(metrics.items())
        if key.startswith("dropped/") and count
    ]
    return {"head": ["dropped by, because", "rows"], "rows": rows}


def stage_curves(stage: str, metrics: Metrics, curve: Any) -> dict[str, Any]:
    """The figures of one training stage: each metric with its held-out twin."""
    panels = []
    for index, (title, columns) in enumerate(training_and_evaluation(list(curve.columns)).items()):
        measured = [(name, curve[name].dropna()) for name in columns if curve[name].notna().any()]
        lines = [
            Line("training" if name == title else "held-out", series.index, series, style=int(name != title))
            for name, series in measured
        ]
        if lines:
            svg = line_figure(lines, title=f"{stage} {title}", id_prefix=f"{stage}-{index}")
            panels.append({"title": title, "svg": svg})
    first = [panel for panel in panels if panel["title"] in FIRST_CURVES] or panels
    summary = ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in metrics.items())
    return {
        "name": stage,
        "summary": summary,
        "first": first,
        "others": [panel for panel in panels if panel not in first],
    }


def side_by_side(samples: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The same prompt answered by each policy; SFT's answer comes with every policy's, should SFT be missing."""
    together = []
    for rows in zip(*samples.values(), strict=True):
        responses = [response_of(policy, row) for policy, row in zip(samples, rows, strict=True)]
        if BASELINE not in samples:
            responses.insert(0, response_of_sft(rows[0]))
        together.append({"row": rows[0]["row"], "prompt": rows[0]["prompt"], "responses": responses})
    return together


def response_of(policy: str, row: dict[str, Any]) -> dict[str, Any]:
    numbers = {"reward": row["reward"], "gold": row.get("gold"), "KL": row["kl"] if policy != BASELINE else None}
    size = f"{number(row['length'])} tokens"
    return response(policy, row["response"], [*named(numbers), size], cut=not row["ended"])


def response_of_sft(row: dict[str, Any]) -> dict[str, Any]:
    numbers = {"reward": row["sft_reward"], "gold": row.get("sft_gold")}
    return response(BASELINE, row["sft_response"], named(numbers), cut=False)


def response(policy: str, text: str, numbers: list[str], *, cut: bool) -> dict[str, Any]:
    return {"policy": shown(policy), "text": text, "numbers": ", ".join(numbers), "cut": cut}


def named(numbers: Mapping[str, float | None]) -> list[str]:
    return [f"{name} {decimal(value)}" for name, value in numbers.items() if value is not None]


def page_of(inputs: Inputs) -> str:
    return render_page(
        "report.html.jinja",
        {
            "title": f"Report on {joined(shown(policy) for policy in inputs.evaluations)}",
            "outcome": outcome(inputs.evaluations, inputs.training["train_rm"], inputs.data.get("bayes_accuracy")),
            "policies": policies_table(inputs.evaluations),
            "reward_model": reward_model_table(inputs),
            "data": data_table(inputs),
            "dropped": dropped_table(inputs),
            "colours": COLOURS,
            "stages": [stage_curves(stage, inputs.training[stage], curve) for stage, curve in inputs.curves.items()],
            "samples": side_by_side(inputs.samples),
            "samples_note": f"The first {SHOWN_SAMPLES} held-out prompts, whatever came of them.",
        },
    )


def joined(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def main(
    metrics: Annotated[Path, typer.Option(help="Folder of the metrics and curves.")],
    samples: Annotated[Path, typer.Option(help="Folder of the samples, one JSON-lines file a policy.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
) -> None:
    """Write the report on what is in METRICS and SAMPLES."""
    started = time.monotonic()
    page = page_of(read_inputs(metrics, samples))
    with written_whole(out) as (partial,):
        write_page(partial, page)
    log_run("report", dvc_hashes([out]), time.monotonic() - started)
    print(f"Wrote {out}; open it in a browser.")


if __name__ == "__main__":
    run(main)
