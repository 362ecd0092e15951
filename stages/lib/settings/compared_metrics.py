"""By which metrics evaluations may be compared, of every entry before anything has run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.lib.settings.epochs import require_compared_metric
from stages.lib.settings.held_out_metrics import held_out_metrics
from stages.lib.settings.named_models import ENSEMBLES, settings_by_key
from stages.lib.settings.rewards import REWARD_MODEL
from stages.lib.settings.validation_metrics import validation_metrics


def require_held_out_metrics(params: Mapping[str, Any]) -> None:
    """`require_compared_metric` of each entry; any source may have validation prompts."""
    for section in ("train_ppo", "train_grpo"):
        for key, settings in settings_by_key(section, params).items():
            if settings.held_out is not None:
                parts = [*named_models_of_reward(settings, params), *settings.rewards]
                found = held_out_metrics(parts, params["sources"].by_name, has_reference=settings.reads_reference)
                require_compared_metric(settings.held_out.best_by, found, f"{key}.held_out")


def require_validation_metrics(params: Mapping[str, Any]) -> None:
    """`require_compared_metric` of each entry that passes over a table."""
    for section in ("train_sft", "train_rm", "train_dpo", "train_unpaired"):
        for key, settings in settings_by_key(section, params).items():
            require_compared_metric(settings.best_by, sorted(validation_metrics(settings)), key)


def named_models_of_reward(settings: Any, params: Mapping[str, Any]) -> list[str]:
    """The names of the reward models among the parts of an entry's reward, those of an ensemble one by one."""
    if not settings.has_reward_model:
        return []
    path = Path(os.path.normpath(settings.reward_model))
    if path.parent != ENSEMBLES:
        return [REWARD_MODEL]
    return sorted(name for name, member in params["ensemble_member"].items() if member.ensemble == path.name)
