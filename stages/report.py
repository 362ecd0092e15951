"""One self-contained HTML page on what a run came to: outcome, policies, reward models, data, curves, samples.

    python -m stages.report --metrics metrics --samples data/samples --scores data/sample_scores \\
        --out metrics/report.html

It shows what params.yaml names, whatever else lies in the folders. The page needs no network and no script; what models
and data say is escaped; the same metrics give the same bytes.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from stages.lib.command.hashing import dvc_hashes
from stages.lib.command.params import read_params
from stages.lib.command.run import run
from stages.lib.operations.run_log import log_run
from stages.lib.report.curve_tables import CurveTable, training_and_evaluation
from stages.lib.report.figures import Line, left_out_note, line_figure, line_sample
from stages.lib.report.number_formats import decimal, number, percent, signed
from stages.lib.report.outcome import Measured, is_below, judges_of, outcome, shown, shown_judge
from stages.lib.report.pages import joined_names, render_page, write_page
from stages.lib.report.report_inputs import SHOWN_SAMPLES, SPLITS, Inputs, Named, read_inputs
from stages.lib.rl.symptoms import symptoms_of_curve
from stages.lib.settings.evaluate import Evaluate
from stages.lib.settings.prepare_data import PrepareData
from stages.lib.settings.score_samples import ScoreSamples

# The curves to see at once; the others of a stage are folded away.
FIRST_CURVES = (
    *("loss", "accuracy", "rewards/accuracies", "rewards/margins"),
    *("objective/scores", "objective/kl", "objective/rlhf_reward", "policy/entropy"),
    *("response/length", "response/eos_rate", "group/distinct", "group/without_variance"),
)
RL_STAGES = ("train_ppo", "train_grpo")
NOTHING = "\N{EN DASH}"


class Cell(NamedTuple):
    """A number of a table, with what stands in small print below it."""

    value: str
    small: str = ""


class TableRow(NamedTuple):
    name: str
    cells: list[Cell]


def policies_table(measured: Mapping[str, Measured], reference: str) -> dict[str, Any]:
    """One row for each policy, and below it one for each source of rows, if there are several."""
    rows = {shown(name): metrics for name, metrics in measured.items()}
    rows = {label: part for name, metrics in rows.items() for label, part in by_source(name, metrics).items()}
    judged = judges_of(rows.values())
    measure = next(
        (name for name in ("gold", "reward", *judged) if any(f"{name}_mean" in row for row in rows.values())), ""
    )
    columns: dict[str, Callable[[Measured], Cell]] = {
        "perplexity": lambda metrics: rounded(metrics, "sft_perplexity", 2),
        "reward": lambda metrics: with_difference(metrics, "reward"),
        "gold utility": lambda metrics: with_difference(metrics, "gold"),
        "judge": lambda metrics: with_difference(metrics, "judge"),
        "gold less what its reward promises": lambda metrics: residual_of(metrics, "gold"),
        "judge less what its reward promises": lambda metrics: residual_of(metrics, "judge"),
        **{shown_judge(judge): partial(with_difference, measure=judge) for judge in judged},
        f"win rate by {shown_judge(measure)}": lambda metrics: share(metrics, f"{measure}_win_rate_vs_reference"),
        f"KL from {reference}, nats": kl_from_reference,
        "ends with EOS": lambda metrics: share(metrics, "eos_rate"),
        "length, tokens": lambda metrics: rounded(metrics, "length_mean", 1),
        "distinct-1": lambda metrics: rounded(metrics, "distinct_1", 3),
        "distinct-2": lambda metrics: rounded(metrics, "distinct_2", 3),
        "preference accuracy": lambda metrics: share(metrics, "preference_accuracy"),
    }
    return table_of(rows, columns)


def table_of(rows: Mapping[str, Measured], columns: Mapping[str, Callable[[Measured], Cell]]) -> dict[str, Any]:
    """The columns in which there is anything."""
    cells = {title: [cell(metrics) for metrics in rows.values()] for title, cell in columns.items()}
    cells = {title: column for title, column in cells.items() if any(cell.value != NOTHING for cell in column)}
    lines = [TableRow(name, [column[place] for column in cells.values()]) for place, name in enumerate(rows)]
    return {"head": ["", *cells], "rows": lines}


def by_source(name: str, metrics: Measured) -> dict[str, Measured]:
    """What was measured on all rows and, as rows of their own, on those of each source: `<metric>/<source>`."""
    found: dict[str, dict[str, float]] = {name: {}}
    for key, value in metrics.items():
        metric, _, source = key.partition("/")
        found.setdefault(f"{name}, {source}" if source else name, {})[metric] = value
    return {**found}


def rounded(metrics: Measured, key: str, places: int) -> Cell:
    return Cell(decimal(metrics[key], places)) if key in metrics else Cell(NOTHING)


def with_difference(metrics: Measured, measure: str) -> Cell:
    """The mean of a measure, and below it the difference from the reference, if it is not the reference's own."""
    if f"{measure}_mean" not in metrics:
        return Cell(NOTHING)
    mean = decimal(metrics[f"{measure}_mean"])
    if f"{measure}_minus_reference_mean" not in metrics:
        return Cell(mean)
    parts = ("mean", "ci_low", "ci_high")
    difference, low, high = (signed(metrics[f"{measure}_minus_reference_{part}"]) for part in parts)
    return Cell(mean, f"{difference} ({low} to {high})")


def residual_of(metrics: Measured, measure: str) -> Cell:
    """The mean distance from the line of held-out replies, with its interval; marked where it lies below."""
    if f"{measure}_residual_mean" not in metrics:
        return Cell(NOTHING)
    mean, low, high = (signed(metrics[f"{measure}_residual_{part}"]) for part in ("mean", "ci_low", "ci_high"))
    return Cell(mean, f"{low} to {high}{': over-optimised' if is_below(metrics, measure) else ''}")


def kl_from_reference(metrics: Measured) -> Cell:
    if "kl_to_reference_mean" not in metrics:
        return Cell(NOTHING)
    low, high = (decimal(metrics[f"kl_to_reference_ci_{end}"]) for end in ("low", "high"))
    return Cell(decimal(metrics["kl_to_reference_mean"]), f"{low} to {high}")


def share(metrics: Measured, key: str) -> Cell:
    """A share, with its interval where there is one."""
    if key not in metrics:
        return Cell(NOTHING)
    if f"{key}_ci_low" not in metrics:
        return Cell(percent(metrics[key]))
    low, high = (percent(metrics[f"{key}_ci_{end}"]) for end in ("low", "high"))
    return Cell(percent(metrics[key]), f"{low} to {high}")


def reward_models_table(inputs: Inputs) -> dict[str, Any]:
    """Each reward model that was evaluated or trained."""
    trained = [name for name, stage in inputs.named.trained.items() if stage == "train_rm"]
    rows: dict[str, Measured] = {}
    for name in dict.fromkeys([*inputs.reward_models, *trained]):
        rows |= by_source(name, {**inputs.training.get(name, {}), **inputs.reward_models.get(name, {})})
    bayes, drawn = (inputs.data.get(name) for name in ("bayes_accuracy", "gold_label_accuracy"))
    on_labels = "" if drawn is None else f"{percent(drawn)} on these labels"
    columns: dict[str, Callable[[Measured], Cell]] = {
        "test accuracy": lambda metrics: share(metrics, "accuracy"),
        "Bayes accuracy": lambda _: Cell(NOTHING, "not known") if bayes is None else Cell(percent(bayes), on_labels),
        "longer reply": lambda metrics: share(metrics, "length_baseline_accuracy"),
        "score and length": lambda metrics: rounded(metrics, "length_correlation", 2),
        "calibration error": lambda metrics: rounded(metrics, "calibration_error", 3),
        "validation accuracy": lambda metrics: share(metrics, "validation_accuracy"),
        "validation loss": lambda metrics: rounded(metrics, "validation_loss", 4),
        "validation correlation": lambda metrics: rounded(metrics, "validation_correlation", 3),
    }
    return table_of(rows, columns)


class PartsBy(NamedTuple):
    """Parts of the test pairs by one thing: the mean of it that each has, and the part's title."""

    mean: str
    title: Callable[[float], str]


PARTS = {
    "length_difference": PartsBy("mean", lambda mean: f"chosen reply {longer_or_shorter(mean)} tokens"),
    "data_margin": PartsBy("mean", lambda mean: f"margin in the data {decimal(mean)}"),
    "reliability": PartsBy("confidence", lambda mean: f"sure of its pick to {percent(mean)}"),
}
ACCURACY_OF_PART = re.compile(rf"(({'|'.join(PARTS)})_\d+)_accuracy")


def longer_or_shorter(difference: float) -> str:
    return f"{'longer' if difference > 0 else 'shorter'} by {decimal(abs(difference), 1)}"


def reward_model_parts(name: str, metrics: Measured) -> dict[str, Any]:
    """The accuracy of a reward model in parts of the pairs, and its reliability curve."""
    rows, curve = [], {}
    for part, by in (found.groups() for key in metrics if (found := ACCURACY_OF_PART.fullmatch(key))):
        mean = metrics[f"{part}_{PARTS[by].mean}"]
        cells = [share(metrics, f"{part}_accuracy"), Cell(number(metrics[f"{part}_pairs"]))]
        rows.append(TableRow(PARTS[by].title(mean), cells))
        if by == "reliability":
            curve[mean] = metrics[f"{part}_accuracy"]
    lines = [Line("accuracy", [*curve], [*curve.values()]), Line("calibrated", [0.5, 1.0], [0.5, 1.0], style=1)]
    svg = line_figure(lines, title=f"{name} reliability", id_prefix=f"{name}-reliability", over="confidence")
    panel = {"title": "accuracy", "svg": svg, "note": ""}
    return {"name": name, "head": ["", "accuracy", "pairs"], "rows": rows, "figures": [panel] if curve else []}


def data_table(inputs: Inputs) -> dict[str, Any]:
    head = ["", *(f"{what}, {split}" for what in ("rows prepared", "rows used", "tokens") for split in SPLITS)]
    rows = []
    for kind, tokens in inputs.tokens.items():
        counts = [inputs.data[f"{kind}/{split}_rows"] for split in SPLITS]
        counts += [tokens[f"{split}_{what}"] for what in ("rows", "tokens") for split in SPLITS]
        rows.append(TableRow(kind, [Cell(number(count)) for count in counts]))
        rows += [TableRow(f"{kind}, {source}", cells) for source, cells in prepared_by_source(inputs, kind)]
    return {"head": head, "rows": rows}


def prepared_by_source(inputs: Inputs, kind: str) -> Iterator[tuple[str, list[Cell]]]:
    """Of each source, where there are several, its prepared rows in each split."""
    ending = f"/{kind}/{SPLITS[0]}_rows"
    sources = [key.removesuffix(ending) for key in inputs.data if key.endswith(ending)]
    for source in sources if len(sources) > 1 else ():
        prepared = [Cell(number(inputs.data[f"{source}/{kind}/{split}_rows"])) for split in SPLITS]
        yield source, prepared + [Cell(NOTHING)] * 2 * len(SPLITS)


def sampled_table(sampled: Mapping[str, Measured]) -> dict[str, Any]:
    """One row for each round of a policy's own replies."""
    columns: dict[str, Callable[[Measured], Cell]] = {
        "prompts": lambda metrics: Cell(number(metrics["prompts"])),
        "replies": lambda metrics: Cell(number(metrics["replies"])),
        "rows made": lambda metrics: Cell(number(metrics["rows"])),
        "reward": lambda metrics: rounded(metrics, "reward_mean", 2),
        "of the best": lambda metrics: rounded(metrics, "reward_best_mean", 2),
        "of the worst": lambda metrics: rounded(metrics, "reward_worst_mean", 2),
        "gap in a pair": lambda metrics: rounded(metrics, "margin_mean", 2),
        "replies that differ": lambda metrics: share(metrics, "replies_distinct_share"),
        "ends with EOS": lambda metrics: share(metrics, "eos_rate"),
        "length, tokens": lambda metrics: rounded(metrics, "length_mean", 1),
    }
    return table_of(sampled, columns)


def dropped_table(inputs: Inputs) -> dict[str, Any]:
    """Rows dropped, by the stage that dropped them and its reason."""
    stages = {
        "prepare_data": inputs.data,
        **{f"tokenize_data {kind}": metrics for kind, metrics in inputs.tokens.items()},
        **{f"sample_pairs {name}": metrics for name, metrics in inputs.sampled.items()},
    }
    rows = [
        TableRow(f"{stage}: {key.removeprefix('dropped/').replace('_', ' ')}", [Cell(number(count))])
        for stage, metrics in stages.items()
        for key, count in sorted(metrics.items())
        if key.startswith("dropped/") and count
    ]
    return {"head": ["dropped by, because", "rows"], "rows": rows}


def model_curves(name: str, stage: str, metrics: Measured, curve: CurveTable) -> dict[str, Any]:
    """The figures of one model's training: each metric with its twin on validation rows."""
    panels = []
    for index, (title, columns) in enumerate(training_and_evaluation(list(curve.metrics)).items()):
        lines = [
            Line("training" if column == title else "validation", *curve.points(column), style=int(column != title))
            for column in columns
        ]
        lines = [line for line in lines if line.values]
        if lines:
            svg = line_figure(lines, title=f"{name} {title}", id_prefix=f"{name}-{index}")
            panels.append({"title": title, "svg": svg, "note": left_out_note(lines)})
    first = [panel for panel in panels if panel["title"] in FIRST_CURVES] or panels
    summary = ", ".join(f"{key.replace('_', ' ')} {number(value)}" for key, value in metrics.items())
    return {
        "name": name,
        "stage": stage,
        "summary": summary,
        "first": first,
        "others": [panel for panel in panels if panel not in first],
    }


def symptoms_of(curve: CurveTable) -> list[str]:
    """What went wrong in an RL stage, a sentence each."""
    phases: list[dict[str, float]] = [{} for _ in curve.steps]
    for name, column in curve.metrics.items():
        for phase, value in zip(phases, column, strict=True):
            phase.update({} if value is None else {name: value})
    return symptoms_of_curve(phases)


def side_by_side(samples: Mapping[str, list[dict[str, Any]]], reference: str) -> list[dict[str, Any]]:
    """The same prompt answered by each policy; the reference's answer comes with a policy's, if it is none of them."""
    samples = {policy: rows for policy, rows in samples.items() if rows}
    together = []
    for rows in zip(*samples.values(), strict=True):
        responses = [response_of(shown(policy), row) for policy, row in zip(samples, rows, strict=True)]
        if reference not in map(shown, samples):
            responses.insert(0, response_of_reference(reference, rows[0]))
        together.append({"row": rows[0]["row"], "prompt": messages_of(rows[0]["prompt"]), "responses": responses})
    return together


def messages_of(prompt: Any) -> list[dict[str, str]]:
    """A prompt without messages is its text."""
    return [{"role": "text", "content": prompt}] if isinstance(prompt, str) else prompt


def response_of(policy: str, row: dict[str, Any]) -> dict[str, Any]:
    numbers = {"reward": row.get("reward"), "gold": row.get("gold"), "KL": row.get("kl")}
    size = f"{number(row['length'])} tokens"
    return response(policy, row["response"], [*named_numbers(numbers), size], cut=not row["ended"])


def response_of_reference(reference: str, row: dict[str, Any]) -> dict[str, Any]:
    numbers = {"reward": row.get("reference_reward"), "gold": row.get("reference_gold")}
    return response(reference, row["reference_response"], named_numbers(numbers), cut=not row["reference_ended"])


def response(policy: str, text: str, numbers: list[str], *, cut: bool) -> dict[str, Any]:
    return {"policy": policy, "text": text, "numbers": ", ".join(numbers), "cut": cut}


def named_numbers(numbers: Mapping[str, float | None]) -> list[str]:
    return [f"{name} {decimal(value)}" for name, value in numbers.items() if value is not None]


def page_of(inputs: Inputs) -> str:
    named, measured = inputs.named, inputs.measured
    reference = shown(named.reference)
    names = [shown(name) for name in named.policies] or [*named.reward_models] or [*named.trained] or ["the data"]
    return render_page(
        "report.html.jinja",
        {
            "title": f"Report on {joined_names(names)}",
            "outcome": outcome(measured, reference, inputs.reward_models, inputs.data),
            "symptoms": {
                name: found
                for name, curve in inputs.curves.items()
                if named.trained[name] in RL_STAGES and (found := symptoms_of(curve))
            },
            "reference": reference,
            "judge": named.judge,
            "policies": policies_table(measured, reference) if measured else None,
            "reward_models": reward_models_table(inputs),
            "parts": [
                found
                for name, metrics in inputs.reward_models.items()
                if (found := reward_model_parts(name, metrics))["rows"]
            ],
            "data": data_table(inputs),
            "dropped": dropped_table(inputs),
            "sampled": sampled_table(inputs.sampled),
            "line_samples": [line_sample(0), line_sample(1)],
            "curves": [
                model_curves(name, named.trained[name], inputs.training[name], curve)
                for name, curve in inputs.curves.items()
            ],
            "samples": side_by_side(inputs.samples, reference),
            "samples_note": f"The first {SHOWN_SAMPLES} test prompts, whatever came of them.",
        },
    )


def named_in_params() -> Named:
    """What params.yaml names."""
    sections = {
        "train_sft": read_params("train_sft", dict[str, Any]),
        "train_rm": read_params("train_rm", dict[str, Any]),
        "train_dpo": read_params("train_dpo", dict[str, Any]),
        "train_unpaired": read_params("train_unpaired", dict[str, Any]),
        "train_ppo": read_params("train_ppo", dict[str, Any]),
        "train_grpo": read_params("train_grpo", dict[str, Any]),
    }
    evaluate, scoring = read_params("evaluate", Evaluate), read_params("score_samples", ScoreSamples)
    at_reference = [name for name, path in evaluate.policies.items() if path == evaluate.reference]
    policies = dict.fromkeys([*at_reference[:1], *evaluate.policies])
    return Named(
        kinds=read_params("prepare_data", PrepareData).kinds,
        trained={name: stage for stage, names in sections.items() for name in names},
        policies=tuple(policies),
        reference=at_reference[0] if at_reference else evaluate.reference,
        scored=scoring.policies,
        judge=scoring.reward_model if scoring.policies else None,
        reward_models=tuple(read_params("evaluate_rm", dict[str, Any])),
        sampled=tuple(read_params("sample_pairs", dict[str, Any])),
    )


def main(
    metrics: Annotated[Path, typer.Option(help="Folder of the metrics and curves.")],
    samples: Annotated[Path, typer.Option(help="Folder of the samples, one JSON-lines file per policy.")],
    scores: Annotated[Path, typer.Option(help="Folder of a reward model's scores of them.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
) -> None:
    """Write the report on what params.yaml names, from METRICS, SAMPLES and SCORES."""
    started = time.monotonic()
    page = page_of(read_inputs(named_in_params(), metrics, samples, scores))
    write_page(out, page)
    log_run("report", dvc_hashes([out]), time.monotonic() - started)
    print(f"Wrote {out}; open it in a browser.")


if __name__ == "__main__":
    run(main)
