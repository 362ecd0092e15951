"""What is measured on test rows: of a policy's responses, and of texts and pairs under it.

Everything is a mean over prompts, tokens or pairs. A metric of a policy's responses alone is an entry in
`OF_RESPONSES`; comparisons with a reference, and metrics of texts and pairs, are functions. Each takes rows, so that it
can be measured on those of one source.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stages.lib.data.prompts import Prompt
from stages.lib.evaluation.intervals import distinct_n, paired_bootstrap_interval, wilson_interval

IMPLICIT_TIE = 1e-3  # nats of an implicit margin that rounding alone explains
Places = Sequence[int]  # places of rows in a table


@dataclass(frozen=True)
class Responses:
    """One policy's responses to the test prompts, in their order."""

    ids: list[list[int]]
    texts: list[str]
    ended: list[bool]  # with EOS, rather than at the limit of new tokens
    kl: list[float]  # to the reference, summed over the response, in nats; estimate k1
    grades: list[float | None]  # by the prompts' tasks; None where a prompt has none

    def of(self, rows: Places) -> "Responses":
        """Those to some of the prompts."""
        columns = {name: [values[row] for row in rows] for name, values in vars(self).items()}
        return Responses(**columns)


OF_RESPONSES: dict[str, Callable[[Responses], float]] = {
    "eos_rate": lambda responses: mean(responses.ended),
    "length_mean": lambda responses: mean([len(ids) for ids in responses.ids]),
    "distinct_1": lambda responses: distinct_n(responses.ids, 1),
    "distinct_2": lambda responses: distinct_n(responses.ids, 2),
}


def with_sources(measure: Callable[[Places], dict[str, float]], sources: Sequence[str]) -> dict[str, float]:
    """What `measure` finds on all rows and, where they are of several sources, on each one's: `<metric>/<source>`.

    Args:
        sources: of each row.
    """
    results = measure(range(len(sources)))
    names = sorted(set(sources))
    for name in names if len(names) > 1 else ():
        rows = [row for row, source in enumerate(sources) if source == name]
        results |= {f"{metric}/{name}": value for metric, value in measure(rows).items()}
    return results


def response_metrics(own: Responses, reference: Responses | None, resamples: int, seed: int) -> dict[str, float]:
    """Everything that is measured on a policy's responses, beside the reference's to the same prompts.

    Grades are compared over the prompts that have one, whose number is `gold_prompts` where it is not all of them.

    Args:
        reference: None where the policy is the reference itself, which has no distance from itself.
    """
    results: dict[str, float] = {"prompts": len(own.ids)}
    both = zip(own.grades, own.grades if reference is None else reference.grades, strict=True)
    graded = [(ours, theirs) for ours, theirs in both if ours is not None and theirs is not None]
    if graded:
        grades, grades_of_reference = [ours for ours, _ in graded], [theirs for _, theirs in graded]
        results["gold_mean"] = mean(grades)
        if reference is not None:
            results |= against_reference("gold", grades, grades_of_reference, resamples, seed)
    if 0 < len(graded) < len(own.ids):
        results["gold_prompts"] = len(graded)
    if reference is not None:
        low, high = paired_bootstrap_interval(own.kl, seed, resamples)
        results |= {"kl_to_reference_mean": mean(own.kl)}
        results |= {"kl_to_reference_ci_low": low, "kl_to_reference_ci_high": high}
    return results | {name: measure(own) for name, measure in OF_RESPONSES.items()}


def against_reference(
    name: str, own: Sequence[float], theirs: Sequence[float], resamples: int, seed: int
) -> dict[str, float]:
    """Paired difference to the reference and win rate (a tie counts half), each with its 95 % interval."""
    differences = [ours - others for ours, others in zip(own, theirs, strict=True)]
    low, high = paired_bootstrap_interval(differences, seed, resamples)
    return {
        f"{name}_minus_reference_mean": mean(differences),
        f"{name}_minus_reference_ci_low": low,
        f"{name}_minus_reference_ci_high": high,
        **above_zero(f"{name}_win_rate_vs_reference", differences),
    }


def score_metrics(
    own: Sequence[float], theirs: Sequence[float] | None, resamples: int, seed: int, measure: str = "reward"
) -> dict[str, float]:
    """A reward model's opinion of a policy's responses, beside the reference's; None: they are the reference's own."""
    results: dict[str, float] = {f"{measure}_mean": mean(own), "prompts": len(own)}
    return results if theirs is None else results | against_reference(measure, own, theirs, resamples, seed)


def text_metrics(logps: Sequence[float], tokens: Sequence[int]) -> dict[str, float]:
    """Cross-entropy of texts in nats per trained token, and the perplexity, which is its exponential.

    Args:
        logps: Σ_t log π of each text's trained tokens, in nats.
        tokens: how many each has.
    """
    loss = -sum(logps) / sum(tokens)
    return {"sft_loss": loss, "sft_perplexity": math.exp(min(loss, 200.0)), "sft_rows": len(logps)}


def preference_metrics(implicit: Sequence[float]) -> dict[str, float]:
    """How often a policy's implicit reward prefers the chosen reply of a pair.

    Args:
        implicit: log π/π_ref of the chosen reply minus that of the rejected one, in nats.
    """
    return {**above_zero("preference_accuracy", implicit, tie=IMPLICIT_TIE), "preference_pairs": len(implicit)}


def implicit_margins(
    chosen: Sequence[float],
    rejected: Sequence[float],
    reference_chosen: Sequence[float],
    reference_rejected: Sequence[float],
) -> list[float]:
    """log π/π_ref of the chosen reply minus that of the rejected one, for each pair, from the log-probs of all four."""
    logps = zip(chosen, rejected, reference_chosen, reference_rejected, strict=True)
    return [own_c - own_r - (ref_c - ref_r) for own_c, own_r, ref_c, ref_r in logps]


def above_zero(name: str, values: Sequence[float], tie: float = 0.0) -> dict[str, float]:
    """Share of values above 0 with its Wilson interval; one within `tie` of 0 counts half."""
    right = sum(1.0 if value > tie else 0.5 if value >= -tie else 0.0 for value in values)
    low, high = wilson_interval(right, len(values))
    return {name: right / len(values), f"{name}_ci_low": low, f"{name}_ci_high": high}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def sample_records(prompts: Sequence[Prompt], own: Responses, reference: Responses | None) -> list[dict[str, Any]]:
    """One record for each prompt: the policy's response beside the reference's, as text and as ids.

    A prompt is a list of messages or, of one that has none or is cut, its text.
    """
    records = []
    for index, prompt in enumerate(prompts):
        record: dict[str, Any] = {
            "row": prompt.row,
            "source": prompt.source,
            "prompt": prompt.shown,
            "response": own.texts[index],
            "length": len(own.ids[index]),
            "ended": own.ended[index],
        }
        # For a reward model with a chat template of its own.
        record |= {name: prompt.context[name] for name in ("tools", "template_arguments") if name in prompt.context}
        if own.grades[index] is not None:
            record["gold"] = own.grades[index]
        if reference is not None:
            record |= {"kl": round(own.kl[index], 6), "reference_response": reference.texts[index]}
            record["reference_ended"] = reference.ended[index]
            if reference.grades[index] is not None:
                record["reference_gold"] = reference.grades[index]
        record |= {"prompt_ids": prompt.ids, "response_ids": own.ids[index]}
        records.append(record | ({} if reference is None else {"reference_response_ids": reference.ids[index]}))
    return records
