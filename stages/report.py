"""One self-contained HTML page on what a run came to: outcome, policies, reward model, data, curves, samples.

    python -m stages.report --metrics metrics --samples data/samples --out metrics/report.html

A policy is in the report if METRICS holds its evaluation. The page needs no network and no script; what models and data
say is escaped; the same metrics give the same bytes.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from stages.lib.command.hashing import dvc_hashes
from stages.lib.command.run import run
from stages.lib.operations.run_log import log_run
from stages.lib.report.curve_tables import CurveTable, training_and_evaluation
from stages.lib.report.figures import Line, left_out_note, line_figure, line_sample
from stages.lib.report.number_formats import decimal, number, percent, signed
from stages.lib.report.outcome import BASELINE, has_gold, outcome, shown
from stages.lib.report.pages import joined_names, render_page, write_page
from stages.lib.report.report_inputs import SHOWN_SAMPLES, SPLITS, Inputs, Metrics, read_inputs

# The curves to see at once; the others of a stage are folded away.
FIRST_CURVES = (
    *("loss", "accuracy", "rewards/accuracies", "rewards/margins"),
    *("objective/scores", "objective/kl", "objective/rlhf_reward", "policy/entropy"),
    *("response/length", "response/eos_rate", "group/distinct", "group/without_variance"),
)
NOTHING = "\N{EN DASH}"


class Cell(NamedTuple):
    """A number of a table, with what stands in small print below it."""

    value: str
    small: str = ""


class TableRow(NamedTuple):
    name: str
    cells: list[Cell]


def policies_table(evaluations: Mapping[str, Metrics], absent: list[str]) -> dict[str, Any]:
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
    rows = [
        TableRow(shown(policy), [cell(metrics) for cell in columns.values()]) for policy, metrics in evaluations.items()
    ]
    return {"head": ["", *columns], "rows": rows, "absent": [shown(policy) for policy in absent]}


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
    return {"head": ["", *cells], "rows": [TableRow("Reward model", list(cells.values()))]}


def data_table(inputs: Inputs) -> dict[str, Any]:
    head = ["", *(f"{what}, {split}" for what in ("rows prepared", "rows used", "tokens") for split in SPLITS)]
    rows = []
    for kind, tokens in inputs.tokens.items():
        counts = [inputs.data[f"{kind}/{split}_rows"] for split in SPLITS]
        counts += [tokens[f"{split}_{what}"] for what in ("rows", "tokens") for split in SPLITS]
        rows.append(TableRow(kind, [Cell(number(count)) for count in counts]))
    raw_rows = number(inputs.data["raw_rows"]) if "raw_rows" in inputs.data else ""
    return {"head": head, "rows": rows, "raw_rows": raw_rows}


def dropped_table(inputs: Inputs) -> dict[str, Any]:
    """Rows dropped, by the stage that dropped them and its reason."""
    stages = {
        "prepare_data": inputs.data,
        **{f"tokenize_data {kind}": metrics for kind, metrics in inputs.tokens.items()},
    }
    rows = [
        TableRow(f"{stage}: {key.removeprefix('dropped/').replace('_', ' ')}", [Cell(number(count))])
        for stage, metrics in stages.items()
        for key, count in sorted(metrics.items())
        if key.startswith("dropped/") and count
    ]
    return {"head": ["dropped by, because", "rows"], "rows": rows}


def stage_curves(stage: str, metrics: Metrics, curve: CurveTable) -> dict[str, Any]:
    """The figures of one training stage: each metric with its held-out twin."""
    panels = []
    for index, (title, columns) in enumerate(training_and_evaluation(list(curve.metrics)).items()):
        lines = [
            Line("training" if name == title else "held-out", *curve.points(name), style=int(name != title))
            for name in columns
        ]
        lines = [line for line in lines if line.values]
        if lines:
            svg = line_figure(lines, title=f"{stage} {title}", id_prefix=f"{stage}-{index}")
            panels.append({"title": title, "svg": svg, "note": left_out_note(lines)})
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
            "title": f"Report on {joined_names(shown(policy) for policy in inputs.evaluations)}",
            "outcome": outcome(inputs.evaluations, inputs.training["train_rm"], inputs.data.get("bayes_accuracy")),
            "policies": policies_table(inputs.evaluations, inputs.absent),
            "reward_model": reward_model_table(inputs),
            "data": data_table(inputs),
            "dropped": dropped_table(inputs),
            "line_samples": [line_sample(0), line_sample(1)],
            "stages": [stage_curves(stage, inputs.training[stage], curve) for stage, curve in inputs.curves.items()],
            "samples": side_by_side(inputs.samples),
            "samples_note": f"The first {SHOWN_SAMPLES} held-out prompts, whatever came of them.",
        },
    )


def main(
    metrics: Annotated[Path, typer.Option(help="Folder of the metrics and curves.")],
    samples: Annotated[Path, typer.Option(help="Folder of the samples, one JSON-lines file per policy.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
) -> None:
    """Write the report on what is in METRICS and SAMPLES."""
    started = time.monotonic()
    page = page_of(read_inputs(metrics, samples))
    write_page(out, page)
    log_run("report", dvc_hashes([out]), time.monotonic() - started)
    print(f"Wrote {out}; open it in a browser.")


if __name__ == "__main__":
    run(main)
