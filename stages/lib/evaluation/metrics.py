"""What is measured on the responses of a policy and on held-out pairs. Everything is a mean over prompts or pairs.

A metric of a policy's responses alone is an entry in `OF_RESPONSES`; comparisons with SFT, and metrics of pairs, are
functions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stages.lib.data.prompts import Prompt
from stages.lib.evaluation.intervals import calibration_error, distinct_n, paired_bootstrap_interval, wilson_interval

IMPLICIT_TIE = 1e-3  # nats of an implicit margin that rounding alone explains


@dataclass(frozen=True)
class Responses:
    """One policy's responses to the held-out prompts, in their order."""

    ids: list[list[int]]
    texts: list[str]
    ended: list[bool]  # with EOS, rather than at the limit of new tokens
    rewards: list[float]
    kl: list[float]  # to SFT, summed over the response, in nats; estimate k1
    grades: list[float | None]  # by the prompts' tasks; None where a prompt has none


OF_RESPONSES: dict[str, Callable[[Responses], float]] = {
    "eos_rate": lambda responses: mean(responses.ended),
    "length_mean": lambda responses: mean([len(ids) for ids in responses.ids]),
    "distinct_1": lambda responses: distinct_n(responses.ids, 1),
    "distinct_2": lambda responses: distinct_n(responses.ids, 2),
}


def response_metrics(own: Responses, sft: Responses, resamples: int, seed: int) -> dict[str, float]:
    """Everything that is measured on a policy's responses, beside SFT's to the same prompts.

    Grades are compared over the prompts that have one, whose number is `gold_prompts` where it is not all of them.
    """
    results: dict[str, float] = {"prompts": len(own.ids)}
    results |= against_sft("reward", own.rewards, sft.rewards, resamples, seed)
    both = zip(own.grades, sft.grades, strict=True)
    graded = [(ours, sfts) for ours, sfts in both if ours is not None and sfts is not None]
    if graded:
        grades, grades_of_sft = [ours for ours, _ in graded], [sfts for _, sfts in graded]
        results |= against_sft("gold", grades, grades_of_sft, resamples, seed)
    if 0 < len(graded) < len(own.ids):
        results["gold_prompts"] = len(graded)
    low, high = paired_bootstrap_interval(own.kl, seed, resamples)
    results |= {"kl_to_sft_mean": mean(own.kl), "kl_to_sft_ci_low": low, "kl_to_sft_ci_high": high}
    return results | {name: measure(own) for name, measure in OF_RESPONSES.items()}


def against_sft(
    name: str, own: Sequence[float], theirs: Sequence[float], resamples: int, seed: int
) -> dict[str, float]:
    """Mean, paired difference to SFT and win rate (a tie counts half), each with its 95 % interval."""
    differences = [ours - sfts for ours, sfts in zip(own, theirs, strict=True)]
    low, high = paired_bootstrap_interval(differences, seed, resamples)
    return {
        f"{name}_mean": mean(own),
        f"{name}_minus_sft_mean": mean(differences),
        f"{name}_minus_sft_ci_low": low,
        f"{name}_minus_sft_ci_high": high,
        **above_zero(f"{name}_win_rate_vs_sft", differences),
    }


def pair_metrics(chosen: Sequence[float], rejected: Sequence[float], implicit: Sequence[float]) -> dict[str, float]:
    """Accuracy on held-out pairs: of the policy's implicit reward, and of the reward model with its calibration.

    Args:
        chosen, rejected: the reward model's scores of the two replies of each pair.
        implicit: log π/π_SFT of the chosen reply minus that of the rejected one, in nats.
    """
    margins = [good - bad for good, bad in zip(chosen, rejected, strict=True)]
    probabilities = torch.sigmoid(torch.tensor(margins, dtype=torch.float64))
    confidence = torch.maximum(probabilities, 1 - probabilities).tolist()
    return {
        **above_zero("preference_accuracy", implicit, tie=IMPLICIT_TIE),
        **above_zero("rm_accuracy", margins),
        "rm_calibration_error": calibration_error(confidence, [float(margin > 0) for margin in margins]),
        "preference_pairs": len(margins),
    }


def implicit_margins(
    chosen: Sequence[float],
    rejected: Sequence[float],
    reference_chosen: Sequence[float],
    reference_rejected: Sequence[float],
) -> list[float]:
    """log π/π_SFT of the chosen reply minus that of the rejected one, for each pair, from the log-probs of all four."""
    logps = zip(chosen, rejected, reference_chosen, reference_rejected, strict=True)
    return [own_c - own_r - (ref_c - ref_r) for own_c, own_r, ref_c, ref_r in logps]


def above_zero(name: str, values: Sequence[float], tie: float = 0.0) -> dict[str, float]:
    """Share of values above 0 with its Wilson interval; one within `tie` of 0 counts half."""
    right = sum(1.0 if value > tie else 0.5 if value >= -tie else 0.0 for value in values)
    low, high = wilson_interval(right, len(values))
    return {name: right / len(values), f"{name}_ci_low": low, f"{name}_ci_high": high}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def sample_records(prompts: Sequence[Prompt], own: Responses, sft: Responses) -> list[dict[str, Any]]:
    """One record for each prompt: the policy's response beside SFT's."""
    records = []
    for index, prompt in enumerate(prompts):
        record = {
            "row": prompt.row,
            "prompt": prompt.messages,
            "response": own.texts[index],
            "reward": round(own.rewards[index], 6),
            "kl": round(own.kl[index], 6),
            "length": len(own.ids[index]),
            "ended": own.ended[index],
            "sft_response": sft.texts[index],
            "sft_reward": round(sft.rewards[index], 6),
        }
        if own.grades[index] is not None:
            record |= {"gold": own.grades[index], "sft_gold": sft.grades[index]}
        records.append(record)
    return records
