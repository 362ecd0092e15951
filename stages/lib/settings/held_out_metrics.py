"""What a held-out evaluation of a policy measures, by the names of its curve behind validation/."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.command.quoted import nearest
from stages.lib.settings.held_out import HeldOutSettings
from stages.lib.settings.named_models import ENSEMBLES, settings_by_key
from stages.lib.settings.reward_columns import part_columns
from stages.lib.settings.rewards import REWARD_MODEL

METRICS = (
    "objective/scores",
    "objective/rewards",
    "objective/rlhf_reward",
    "objective/kl",
    "response/length",
    "response/eos_rate",
    "policy/entropy",
)


def held_out_metrics(parts: Sequence[str], sources: Iterable[str], *, has_reference: bool) -> list[str]:
    """`METRICS`, and where there are several rewards or sources the mean of each reward, as of a verifier.

    Args:
        parts: names of the parts of the reward.
        sources: of the prompts.
    """
    metrics = [metric for metric in METRICS if has_reference or metric != "objective/kl"]
    return metrics + [column for columns in part_columns(parts, sources).values() for column in columns]


def require_compared_metric(held_out: HeldOutSettings, metrics: Sequence[str], key: str) -> None:
    """Raise StageError, naming the entry `key`, if evaluations are compared by an unknown metric."""
    name = held_out.best_by.metric
    if name not in metrics:
        raise StageError(
            f"params.yaml: {key}.held_out.best_by.metric: there is no metric {name!r} here{nearest(name, metrics)}; "
            f"there are {', '.join(metrics)}"
        )


def require_held_out_metrics(params: Mapping[str, Any]) -> None:
    """The same of each entry before anything has run, when any source may have validation prompts."""
    for section in ("train_ppo", "train_grpo"):
        for key, settings in settings_by_key(section, params).items():
            if settings.held_out is not None:
                parts = [*named_models_of_reward(settings, params), *settings.rewards]
                found = held_out_metrics(parts, params["sources"].by_name, has_reference=settings.reads_reference)
                require_compared_metric(settings.held_out, found, key)


def named_models_of_reward(settings: Any, params: Mapping[str, Any]) -> list[str]:
    """The names of the reward models among the parts of an entry's reward, those of an ensemble one by one."""
    if not settings.has_reward_model:
        return []
    path = Path(os.path.normpath(settings.reward_model))
    if path.parent != ENSEMBLES:
        return [REWARD_MODEL]
    return sorted(name for name, member in params["ensemble_member"].items() if member.ensemble == path.name)
