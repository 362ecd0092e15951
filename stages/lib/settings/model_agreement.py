"""What can be known of reward models and of models on the way before the first stage has run.

Each check raises a StageError that names the key.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.models.reward_head import find_reward_head, score_scale
from stages.lib.settings.named_models import ENSEMBLES, MODELS, TRAINED, made_by_stages, named_paths, settings_by_key

SCORED = (
    "ensemble_member",
    "sample_pairs",
    "pass_rates",
    "train_ppo",
    "train_grpo",
    "evaluate_rm",
    "score_samples",
)  # sections that name a reward model
STEP = re.compile(r"step_([1-9]\d{0,17})")


def require_readable_reward_models(params: Mapping[str, Any]) -> None:
    """Raise StageError where a reward model from elsewhere has no clear head or label, or one of ours is asked for one.

    A folder that only DVC knows of is looked at when it is there.
    """
    made = made_by_stages(params)
    for stage in SCORED:
        if stage == "score_samples" and not params[stage].policies:
            continue
        for key, settings in settings_by_key(stage, params).items():
            if not getattr(settings, "has_reward_model", True):
                continue
            path = Path(os.path.normpath(settings.reward_model))
            makers = [made[folder] for folder in (path, *path.parents) if folder in made]
            maker = next((name for name, what in makers if what is not None), None)  # a fetched model is from elsewhere
            standardise = getattr(settings, "standardise_reward", False)
            if path.parent == ENSEMBLES:
                require_plain_ensemble(path.name, key, settings, params)
                continue
            if standardise and maker is not None and path not in made:
                raise StageError(
                    f"params.yaml: {key}.standardise_reward: {path} is a model on the way, of which {maker} leaves no "
                    "mean and standard deviation of scores; set false"
                )
            for name in ("reward_head", "reward_label"):
                if maker is not None and getattr(settings, name) is not None:
                    raise StageError(
                        f"params.yaml: {key}.{name}: {path}, which {maker} makes, has one head of one output; set null"
                    )
            if maker is None and path.is_dir():
                try:
                    head = find_reward_head(path, settings)
                    if standardise:
                        score_scale(path, head)
                except StageError as error:
                    raise StageError(f"params.yaml: {key}: {error}") from None


def require_plain_ensemble(name: str, key: str, settings: Any, params: Mapping[str, Any]) -> None:
    """Raise StageError where an entry says of an ensemble what each member says of itself, or has a member's name.

    And for a file in its folder that is of no member.
    """
    if (settings.reward_head, settings.reward_label, settings.standardise_reward) != (None, None, False):
        raise StageError(
            f"params.yaml: {key}: reward_head, reward_label and standardise_reward are those of each member of an "
            f"ensemble (ensemble_member); set null, null and false"
        )
    members = [member for member, own in params["ensemble_member"].items() if own.ensemble == name]
    twice = [member for member in members if member in settings.rewards]
    if twice:
        raise StageError(f"params.yaml: {key}.rewards.{twice[0]}: a member of the ensemble has that name; rename one")
    # DVC leaves the file of an entry that was taken out, and a training stage counts each file as a member.
    strays = sorted(file for file in (ENSEMBLES / name).glob("*.json") if file.stem not in members)
    if members and strays:
        raise StageError(f"{strays[0]} is of no entry of ensemble_member, and would be scored with, too; remove it")


def require_models_on_the_way(params: Mapping[str, Any]) -> None:
    """Raise StageError for a path below a model that a stage makes, unless save_every gives such a folder."""
    save_every = {
        MODELS / key.partition(".")[2]: (key, settings.save_every)
        for stage in TRAINED
        for key, settings in settings_by_key(stage, params).items()
    }
    for key, path, _ in named_paths(params):
        normal = Path(os.path.normpath(path))
        for folder in normal.parents:
            if folder not in save_every:
                continue
            maker, saves = save_every[folder]
            step = STEP.fullmatch(str(normal.relative_to(folder)))
            if step is None or saves is None or int(step[1]) % saves.steps:
                every = "null" if saves is None else f"each {saves.steps} steps"
                raise StageError(
                    f"params.yaml: {key}: {maker} makes no folder {normal} ({maker}.save_every: {every}); "
                    f"there may be {folder}/step_<n>"
                )
