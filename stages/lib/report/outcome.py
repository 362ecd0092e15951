"""The outcome of a run in three sentences made from its metrics: better than SFT or not, by whose measure, how far off.

A difference counts as one only if its 95 % interval leaves out zero, an accuracy as better than guessing only if its
interval lies above one half.
"""

from collections.abc import Mapping

from stages.lib.report.number_formats import decimal, number, percent, signed

BASELINE = "sft"
Measured = Mapping[str, float]


def outcome(policies: Mapping[str, Measured], reward_model: Measured, bayes_accuracy: float | None) -> list[str]:
    """Three sentences.

    Args:
        policies: the evaluation of each policy by its name; `sft` is the baseline and may be missing.
        reward_model: the metrics of the reward model's training: `eval_accuracy` with its interval.
        bayes_accuracy: the best accuracy that can be expected on the held-out pairs, or None where it is unknown.
    """
    return [
        policies_against_sft({name: metrics for name, metrics in policies.items() if name != BASELINE}),
        of_reward_model(reward_model, bayes_accuracy),
        of_drift(policies),
    ]


def policies_against_sft(trained: Mapping[str, Measured]) -> str:
    if not trained:
        return "No policy but SFT was evaluated, so there is nothing to compare it with."
    count = number(next(iter(trained.values()))["prompts"])
    clauses = "; ".join(comparison(name, metrics) for name, metrics in trained.items())
    sentence = f"On {count} held-out prompts, {clauses}"
    if not any(has_gold(metrics) for metrics in trained.values()):
        sentence += "; that is the reward model's own opinion, as this data has no gold utility to check it against"
    return f"{sentence}."


def comparison(name: str, metrics: Measured) -> str:
    """What became of one policy, by the gold utility where there is one."""
    if not has_gold(metrics):
        return f"{shown(name)} {verdict(metrics, 'reward')} in mean reward ({evidence(metrics, 'reward')})"
    graded = f" on {number(metrics['gold_prompts'])} of them" if "gold_prompts" in metrics else ""
    text = f"{shown(name)} {verdict(metrics, 'gold')} in mean gold utility{graded} ({evidence(metrics, 'gold')})"
    if verdict(metrics, "gold") != "beats SFT" and verdict(metrics, "reward") == "beats SFT":
        text += f", although the reward model puts it above SFT ({difference(metrics, 'reward')})"
    return text


def verdict(metrics: Measured, measure: str) -> str:
    if metrics[f"{measure}_minus_sft_ci_low"] > 0:
        return "beats SFT"
    if metrics[f"{measure}_minus_sft_ci_high"] < 0:
        return "falls below SFT"
    return "cannot be told from SFT"


def difference(metrics: Measured, measure: str) -> str:
    mean, low, high = (signed(metrics[f"{measure}_minus_sft_{part}"]) for part in ("mean", "ci_low", "ci_high"))
    includes_zero = ", which includes zero" if verdict(metrics, measure) == "cannot be told from SFT" else ""
    return f"{mean}, 95\N{NO-BREAK SPACE}% interval {low} to {high}{includes_zero}"


def evidence(metrics: Measured, measure: str) -> str:
    rate, low, high = (percent(metrics[f"{measure}_win_rate_vs_sft{part}"]) for part in ("", "_ci_low", "_ci_high"))
    return f"{difference(metrics, measure)}; better on {rate} of the prompts, {low} to {high}"


def of_reward_model(metrics: Measured, bayes_accuracy: float | None) -> str:
    accuracy, low, high = (metrics[f"eval_accuracy{part}"] for part in ("", "_ci_low", "_ci_high"))
    sentence = (
        f"The reward model agrees with {percent(accuracy)} of the held-out preferences "
        f"(95\N{NO-BREAK SPACE}% interval {percent(low)} to {percent(high)}"
    )
    if high < 0.5:
        sentence += ", which is worse than guessing)"
    elif low <= 0.5:
        sentence += ", which cannot be told from guessing)"
    else:
        sentence += ")"
    if bayes_accuracy is None:
        return f"{sentence}; the best accuracy that could be reached on this data is not known."
    gap = 100 * (bayes_accuracy - accuracy)
    side = "below" if gap >= 0 else "above"
    return (
        f"{sentence}, {decimal(abs(gap), 1)} points {side} the Bayes accuracy of {percent(bayes_accuracy)}, "
        "the most that any model can expect."
    )


def of_drift(policies: Mapping[str, Measured]) -> str:
    ended = {name: percent(metrics["eos_rate"]) for name, metrics in policies.items()}
    endings = f"the share of responses that end by themselves, with EOS, is {listed(ended)}"
    moved = {name: decimal(metrics["kl_to_sft_mean"]) for name, metrics in policies.items() if name != BASELINE}
    if not moved:
        return f"{endings[0].upper()}{endings[1:]}."
    return f"The KL from SFT, in nats per response, is {listed(moved)}; {endings}."


def listed(values: Mapping[str, str]) -> str:
    """'1.2 for DPO and 3.4 for PPO'."""
    parts = [f"{value} for {shown(name)}" for name, value in values.items()]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def shown(name: str) -> str:
    """A policy's name as its field writes it."""
    return name.upper()


def has_gold(metrics: Measured) -> bool:
    return "gold_mean" in metrics


def graded_prompts(metrics: Measured) -> float:
    """How many of the prompts have a gold utility; the metrics count them only where it is a part."""
    return metrics.get("gold_prompts", metrics["prompts"]) if has_gold(metrics) else 0
