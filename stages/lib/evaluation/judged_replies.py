"""What rewards say of a policy's responses to the test prompts, beside the reference's."""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.lib.evaluation.metrics import Places, against_reference, mean
from stages.lib.rl.rewards.mixture import Mixture
from stages.lib.rl.rewards.scoring import Failure, RewardScore

Judgements = Mapping[str, Sequence[RewardScore]]  # by the reward's name, of each response


def weighted_sums(judges: Mixture, said: Judgements) -> list[float | None]:
    """The sum of what each response was given, times the rewards' weights; None where nothing of a weight applies."""
    weights = {name: part.weight for name, part in judges.by_name.items() if part.weight}
    rows = zip(*(said[name] for name in weights), strict=True)
    return [weighted_sum(weights.values(), scores) for scores in rows]


def weighted_sum(weights: Any, scores: Sequence[RewardScore]) -> float | None:
    pairs = [(weight, score) for weight, score in zip(weights, scores, strict=True) if score is not None]
    return sum(weight * score for weight, score in pairs if not isinstance(score, Failure)) if pairs else None


def judged_metrics(
    own: Judgements, theirs: Judgements | None, places: Places, resamples: int, seed: int
) -> dict[str, float]:
    """Of each reward the mean, and the comparison with the reference over the prompts on which both have a number.

    A reward that fails where it may counts 0, as in training; failures are counted by their kind.
    `reward_of_<name>_prompts` is how many prompts a reward applies to, where these are not all.

    Args:
        theirs: None where the policy is the reference itself.
        places: of the prompts to measure on.
    """
    results: dict[str, float] = {}
    for name, scores in own.items():
        key = f"reward_of_{name}"
        pairs = [(scores[place], scores[place] if theirs is None else theirs[name][place]) for place in places]
        both = [(counted(one), counted(other)) for one, other in pairs]
        numbers = [(one, other) for one, other in both if one is not None and other is not None]
        if numbers:
            ours, others = [one for one, _ in numbers], [other for _, other in numbers]
            results[f"{key}_mean"] = mean(ours)
            results |= {} if theirs is None else against_reference(key, ours, others, resamples, seed)
        if 0 < len(numbers) < len(pairs):
            results[f"{key}_prompts"] = len(numbers)
        failed = [score.kind for score, _ in pairs if isinstance(score, Failure)]
        results |= {f"{key}_{kind}s": failed.count(kind) for kind in ("error", "timeout") if kind in failed}
    return results


def counted(score: RewardScore) -> float | None:
    """What a score counts: a failure 0; None where the reward does not apply."""
    return 0.0 if isinstance(score, Failure) else score


def judged_record(said: Judgements, place: int) -> dict[str, float]:
    """What each reward said of one response, where it gave a number."""
    scores = {name: scores[place] for name, scores in said.items()}
    return {name: round(score, 6) for name, score in scores.items() if isinstance(score, float)}
