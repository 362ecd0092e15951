"""The outcome of a run in sentences made from its metrics: better than the reference or not, by whose measure, how far.

A difference counts as one only if its 95 % interval leaves out zero, an accuracy as better than guessing only if its
interval lies above one half.
"""

import re
from collections.abc import Iterable, Mapping

from stages.lib.report.number_formats import decimal, number, percent, signed

KNOWN = ("sft", "dpo", "ppo", "grpo")  # whose names their field writes in capitals
Measured = Mapping[str, float]
JUDGE = re.compile(r"reward_of_.+(?<!_minus_reference)_mean")


def outcome(
    policies: Mapping[str, Measured],
    reference: str,
    reward_models: Mapping[str, Measured],
    known: Measured,
) -> list[str]:
    """The sentences, one for each thing that was measured.

    Args:
        policies: what was measured on each policy, by its name; the reference may be among them.
        reference: its name as it is shown.
        reward_models: what was measured on each reward model.
        known: of the data; of the test pairs `bayes_accuracy`, the best accuracy that can be expected, and
            `gold_label_accuracy`, that of the gold utility on the labels drawn, where they are known.
    """
    answered = {name: metrics for name, metrics in policies.items() if "prompts" in metrics}
    compared = {name: metrics for name, metrics in answered.items() if is_compared(metrics)}
    sentences = [of_comparisons(compared, reference)] if compared else []
    sentences += [
        said
        for measure, judge in (("gold", "gold utility"), ("judge", "score by the judge"))
        if (said := of_residuals(policies, measure, judge))
    ]
    sentences += [of_reward_model(name, metrics, known) for name, metrics in reward_models.items()]
    texts = {name: metrics for name, metrics in policies.items() if "sft_perplexity" in metrics}
    sentences += [of_texts(texts)] if texts else []
    sentences += [of_drift(answered, reference)] if answered else []
    return sentences or ["Nothing was evaluated."]


def is_compared(metrics: Measured) -> bool:
    """Whether a policy was compared with the reference, rather than being it."""
    return "kl_to_reference_mean" in metrics


def of_comparisons(compared: Mapping[str, Measured], reference: str) -> str:
    measured = {name: measure_of(metrics) for name, metrics in compared.items()}
    if not any(measured.values()):
        return f"Neither a gold utility nor a reward model says which policy is better than {reference}."
    count = number(next(iter(compared.values()))["prompts"])
    clauses = [comparison(name, compared[name], measure, reference) for name, measure in measured.items() if measure]
    sentence = f"On {count} test prompts, {'; '.join(clauses)}"
    if "gold" not in measured.values() and "reward" in measured.values():
        sentence += "; that is the reward model's own opinion, as this data has no gold utility to check it against"
    return f"{sentence}."


def measure_of(metrics: Measured) -> str | None:
    """What a policy is judged by: the gold utility where there is one, or a reward model, or nothing."""
    judges = ("gold", "reward", *judges_of([metrics]))
    return next((name for name in judges if f"{name}_minus_reference_mean" in metrics), None)


def judges_of(measured: Iterable[Measured]) -> list[str]:
    """The measures that are rewards of evaluate.rewards."""
    keys = dict.fromkeys(key for metrics in measured for key in metrics)
    return [key.removesuffix("_mean") for key in keys if JUDGE.fullmatch(key)]


def shown_judge(measure: str) -> str:
    """A measure's name without what says that it is a reward of evaluate.rewards."""
    return measure.removeprefix("reward_of_")


def comparison(name: str, metrics: Measured, measure: str, reference: str) -> str:
    """What became of one policy."""
    said = f"{shown(name)} {verdict(metrics, measure, reference)} in mean"
    if measure != "gold":
        return f"{said} {shown_judge(measure)} ({evidence(metrics, measure, reference)})"
    graded = f" on {number(metrics['gold_prompts'])} of them" if "gold_prompts" in metrics else ""
    text = f"{said} gold utility{graded} ({evidence(metrics, 'gold', reference)})"
    beats = f"beats {reference}"
    if "reward_minus_reference_mean" not in metrics or verdict(metrics, "gold", reference) == beats:
        return text
    if verdict(metrics, "reward", reference) == beats:
        text += f", although the reward model puts it above {reference} ({difference(metrics, 'reward', reference)})"
    return text


def verdict(metrics: Measured, measure: str, reference: str) -> str:
    if metrics[f"{measure}_minus_reference_ci_low"] > 0:
        return f"beats {reference}"
    if metrics[f"{measure}_minus_reference_ci_high"] < 0:
        return f"falls below {reference}"
    return f"cannot be told from {reference}"


def difference(metrics: Measured, measure: str, reference: str) -> str:
    mean, low, high = (signed(metrics[f"{measure}_minus_reference_{part}"]) for part in ("mean", "ci_low", "ci_high"))
    includes_zero = ", which includes zero" if verdict(metrics, measure, reference).startswith("cannot") else ""
    return f"{mean}, 95\N{NO-BREAK SPACE}% interval {low} to {high}{includes_zero}"


def evidence(metrics: Measured, measure: str, reference: str) -> str:
    rate, low, high = (
        percent(metrics[f"{measure}_win_rate_vs_reference{part}"]) for part in ("", "_ci_low", "_ci_high")
    )
    return f"{difference(metrics, measure, reference)}; better on {rate} of the prompts, {low} to {high}"


def of_residuals(policies: Mapping[str, Measured], measure: str, judge: str) -> str:
    """Which policies lie below the line that relates reward to a better measure; "" where nothing was measured."""
    measured = {name: metrics for name, metrics in policies.items() if f"{measure}_residual_mean" in metrics}
    below = {name: residual(metrics, measure) for name, metrics in measured.items() if is_below(metrics, measure)}
    if not measured:
        return ""
    if not below:
        return f"No policy's mean {judge} lies clearly below that of held-out replies with the same reward."
    return (
        f"Over-optimised: the mean {judge} lies below that of held-out replies with the same reward by "
        f"{listed(below)}; such a policy exploits what the reward model gets wrong."
    )


def is_below(metrics: Measured, measure: str) -> bool:
    return metrics.get(f"{measure}_residual_ci_high", 0.0) < 0


def residual(metrics: Measured, measure: str) -> str:
    """The shortfall, as a positive number, with its interval."""
    short, least, most = (decimal(-metrics[f"{measure}_residual_{part}"]) for part in ("mean", "ci_high", "ci_low"))
    return f"{short} (95\N{NO-BREAK SPACE}% interval {least} to {most})"


def of_reward_model(name: str, metrics: Measured, known: Measured) -> str:
    accuracy, low, high = (metrics[f"accuracy{part}"] for part in ("", "_ci_low", "_ci_high"))
    sentence = (
        f"The reward model {name} agrees with {percent(accuracy)} of the test preferences "
        f"(95\N{NO-BREAK SPACE}% interval {percent(low)} to {percent(high)}"
    )
    if high < 0.5:
        sentence += ", which is worse than guessing)"
    elif low <= 0.5:
        sentence += ", which cannot be told from guessing)"
    else:
        sentence += ")"
    bayes_accuracy = known.get("bayes_accuracy")
    if bayes_accuracy is None:
        return f"{sentence}; the best accuracy that could be reached on this data is not known."
    gap = 100 * (bayes_accuracy - accuracy)
    side = "below" if gap >= 0 else "above"
    drawn = known.get("gold_label_accuracy")
    on_labels = "" if drawn is None else f"; on these labels, as they were drawn, the gold utility has {percent(drawn)}"
    return (
        f"{sentence}, {decimal(abs(gap), 1)} points {side} the Bayes accuracy of {percent(bayes_accuracy)}, "
        f"the most that any model can expect{on_labels}."
    )


def of_texts(policies: Mapping[str, Measured]) -> str:
    count = number(next(iter(policies.values()))["sft_rows"])
    found = {name: number(metrics["sft_perplexity"]) for name, metrics in policies.items()}
    return f"The perplexity of {count} test texts is {listed(found)}."


def of_drift(policies: Mapping[str, Measured], reference: str) -> str:
    ended = {name: percent(metrics["eos_rate"]) for name, metrics in policies.items()}
    endings = f"the share of responses that end by themselves, with EOS, is {listed(ended)}"
    moved = {
        name: decimal(metrics["kl_to_reference_mean"]) for name, metrics in policies.items() if is_compared(metrics)
    }
    if not moved:
        return f"{endings[0].upper()}{endings[1:]}."
    return f"The KL from {reference}, in nats per response, is {listed(moved)}; {endings}."


def listed(values: Mapping[str, str]) -> str:
    """'1.2 for DPO and 3.4 for PPO'."""
    parts = [f"{value} for {shown(name)}" for name, value in values.items()]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def shown(name: str) -> str:
    """A policy's name as its field writes it, where it has one."""
    return name.upper() if name in KNOWN else name


def has_gold(metrics: Measured) -> bool:
    return "gold_mean" in metrics


def graded_prompts(metrics: Measured) -> float:
    """How many of the prompts have a gold utility; the metrics count them only where it is a part."""
    return metrics.get("gold_prompts", metrics["prompts"]) if has_gold(metrics) else 0
