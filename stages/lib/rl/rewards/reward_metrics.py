"""What the rewards of a mixture said of a phase, by name and by source: columns of the curve."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

from stages.lib.rl.rewards.scoring import Failure, RewardScore
from stages.lib.rl.rollouts import Rollouts
from stages.lib.settings.reward_columns import KINDS
from stages.lib.settings.rewards import REWARD_MODEL


def with_parts(rollouts: Rollouts, parts: Mapping[str, Sequence[RewardScore]]) -> Rollouts:
    """Rollouts that hold what each part of their reward said."""
    device = rollouts.logps.device
    tensors = {name: torch.tensor(numbers_of(scores), device=device) for name, scores in parts.items()}
    return rollouts._replace(parts=tensors, failures=failures_of(parts))


def failures_of(parts: Mapping[str, Sequence[RewardScore]]) -> dict[str, Counter[str]]:
    """How often each part has failed, by its name and the kind of the failure."""
    return {
        name: Counter[str](score.kind for score in scores if isinstance(score, Failure))
        for name, scores in parts.items()
    }


def numbers_of(scores: Iterable[RewardScore]) -> list[float]:
    """The scores as numbers, NaN for those that are missing or failed."""
    return [math.nan if score is None or isinstance(score, Failure) else score for score in scores]


def reward_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Of each part the mean over the responses that it applies to, on all rows and on each source's, and its failures.

    Nothing where a reward model alone takes part on one source. A mean over no responses is left out.
    """
    sources = [episode.prompt.source for episode in rollouts.episodes]
    if not rollouts.parts or ([*rollouts.parts] == [REWARD_MODEL] and len(set(sources)) < 2):
        return {}
    found: dict[str, float] = {}
    for name, values in rollouts.parts.items():
        rows = {f"rewards/{name}": [*range(len(sources))]}
        if len(set(sources)) > 1:
            for row, source in enumerate(sources):
                rows.setdefault(f"rewards/{name}/{source}", []).append(row)
        means = {column: float(values[own].nanmean()) for column, own in rows.items()}
        found |= {column: mean for column, mean in means.items() if not math.isnan(mean)}
        found |= {f"reward_{kind}s/{name}": float(rollouts.failures[name].get(kind, 0)) for kind in KINDS}
    return found
