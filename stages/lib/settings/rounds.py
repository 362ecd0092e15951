"""Rounds of sampling and training: what is made of a policy's replies, who trains on it, and that prompts are fresh.

Each check raises a StageError that names the key, before the first stage has run.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.settings.named_models import MODELS, NEEDED_KIND, SAMPLED, TRAINED, needed_kind, settings_by_key
from stages.lib.settings.sample_pairs import SamplePairs
from stages.lib.settings.training_tokens import TrainingTokens


def require_rounds(params: Mapping[str, Any]) -> None:
    """Raise StageError where sampled rows are not what a stage reads, or a round's prompts are not fresh."""
    require_sampled_rows(params)
    require_fresh_prompts(params)


def require_sampled_rows(params: Mapping[str, Any]) -> None:
    """Raise StageError where a stage would read sampled rows of another kind or split than are made."""
    for stage in NEEDED_KIND:
        for key, settings in settings_by_key(stage, params).items():
            if not isinstance(settings, TrainingTokens):
                continue
            for name, split in (("tokens", "train"), ("validation_tokens", "validation")):
                maker = maker_of_rows(getattr(settings, name), params)
                if maker is None:
                    continue
                made, kind = params["sample_pairs"][maker], needed_kind(stage, settings)
                if made.kind != kind or made.split != split:
                    raise StageError(
                        f"params.yaml: {key}.{name}: expected rows of kind {kind} and split {split}, and "
                        f"sample_pairs.{maker} makes {made.kind} of split {made.split}"
                    )


def maker_of_rows(folder: str, params: Mapping[str, Any]) -> str | None:
    """The entry of sample_pairs that makes a folder of token tables, if one does."""
    path = Path(os.path.normpath(folder))
    return path.name if path.parent == SAMPLED and path.name in params["sample_pairs"] else None


def require_fresh_prompts(params: Mapping[str, Any]) -> None:
    """Raise StageError where a policy is sampled on prompts that it was trained on in an earlier round, or itself."""
    for name, settings in params["sample_pairs"].items():
        for earlier in rounds_behind(settings.model, params):
            if earlier == name:
                raise StageError(
                    f"params.yaml: sample_pairs.{name}.model: {settings.model} is trained on what is sampled from it; "
                    "a graph has no cycle: give each round an entry, and a model, of its own"
                )
            before = params["sample_pairs"][earlier]
            if before.split == settings.split and overlap(before.asked, settings.asked):
                raise StageError(
                    f"params.yaml: sample_pairs.{name}: {told(settings)} has prompts of {told(before)} of "
                    f"sample_pairs.{earlier}, on which {settings.model} was trained; give it another round, and all "
                    "rounds equally many prompts"
                )


def told(settings: SamplePairs) -> str:
    return f"round {settings.round} of {settings.prompts} prompts"


def overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


def rounds_behind(model: str, params: Mapping[str, Any]) -> Iterator[str]:
    """The entries of sample_pairs that a model was trained on, itself or one that it started from, each once."""
    trained = {MODELS / name: settings for stage in TRAINED for name, settings in params[stage].items()}
    paths, seen = [model], set[Path]()
    while paths:
        path = Path(os.path.normpath(paths.pop()))
        folder = next((above for above in (path, *path.parents) if above in trained), None)
        if folder is None or folder in seen:
            continue
        seen.add(folder)
        settings = trained[folder]
        paths.append(settings.model)
        maker = maker_of_rows(settings.tokens, params) if isinstance(settings, TrainingTokens) else None
        if maker is not None:
            yield maker
            paths.append(params["sample_pairs"][maker].model)
