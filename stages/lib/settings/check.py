"""The check of all of params.yaml and runtime.yaml, with each other and with the base model, before anything runs."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.lib.command.params import GRAPH_FILE, PARAMS_FILE
from stages.lib.command.strict_yaml import load_yaml
from stages.lib.models.model_facts import ModelFacts, read_config, read_model_facts, read_object
from stages.lib.operations.scratch_root import scratch_root
from stages.lib.settings.agreement import require_agreement, require_model_fits, require_paths
from stages.lib.settings.compared_metrics import require_held_out_metrics, require_validation_metrics
from stages.lib.settings.model_agreement import require_models_on_the_way, require_readable_reward_models
from stages.lib.settings.named_models import settings_by_key
from stages.lib.settings.prepare_base import ModelOfFolder, ModelOfHub, NewModel, PrepareBase
from stages.lib.settings.reward_functions import reward_files
from stages.lib.settings.runtime import read_runtimes
from stages.lib.settings.sections import read_all_params
from stages.lib.settings.source_agreement import require_served


def outs_of_graph(graph: dict[str, Any], document: dict[str, Any]) -> list[str]:
    """The paths that the stages write: of a group one for each entry of its mapping; of a matrix what precedes an item.

    Args:
        document: params.yaml.
    """
    found = []
    for stage in graph.get("stages", {}).values():
        body = stage.get("do", stage)
        entries = [entry for kind in ("outs", "metrics", "plots") for entry in body.get(kind) or ()]
        names = entries_of_group(stage, document)
        for path in (next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries):
            is_for_each = "${key}" in path or "${item}" in path
            found += (
                [path.replace("${key}", name).replace("${item}", name) for name in names] if is_for_each else [path]
            )
    return [path.partition("${")[0].rstrip("/") for path in found]


def entries_of_group(stage: dict[str, Any], document: dict[str, Any]) -> list[str]:
    """The names for each of which a group with `foreach: ${section.key}` has a stage: a mapping's keys, or a list."""
    values: Any = document
    for part in str(stage.get("foreach", "")).strip("${}").split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return [*values] if isinstance(values, dict | list) else []


def known_models(base: PrepareBase) -> Iterator[tuple[ModelFacts, str]]:
    """What is known of models before they are made, and their names; nothing of a Hub model that is not here yet."""
    for name, model in base.models.items():
        if isinstance(model, NewModel):
            config, told = config_of_new(model), f"the new model (prepare_base.scratch.{name})"
        elif isinstance(model, ModelOfFolder):
            config, told = config_of_folder(model), model.path
        else:
            config, told = cached_config(model), f"Hub model {model.model}"
        if config is not None:
            yield read_model_facts(config, f"{told}: config.json"), told


def config_of_new(model: NewModel) -> dict[str, Any]:
    return {"model_type": "llama", "vocab_size": model.vocab_size, "max_position_embeddings": model.max_positions}


def config_of_folder(model: ModelOfFolder) -> dict[str, Any] | None:
    """None if only DVC knows of the folder."""
    folder = Path(model.path)
    return read_config(folder) if folder.exists() else None


def cached_config(model: ModelOfHub) -> dict[str, Any] | None:
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(model.model, "config.json", revision=model.revision)
    return read_object(Path(file)) if isinstance(file, str) else None


def reward_files_of(section: str, params: Mapping[str, Any]) -> list[str]:
    """The files of the reward functions of a section. Raises StageError as `reward_files` does."""
    files: set[str] = set()
    for key, settings in settings_by_key(section, params).items():
        files.update(reward_files(getattr(settings, "rewards", {}), f"{key}.rewards"))
    return sorted(files)


def check_settings() -> list[str]:
    """Raise a StageError for the first fault. Returns warnings."""
    params, runtimes = read_all_params(), read_runtimes()
    sources, data, base = params["sources"], params["prepare_data"], params["prepare_base"]
    require_agreement(params, runtimes)
    require_served(data, sources)
    for section in params:
        reward_files_of(section, params)
    require_paths(sources, data, base, outs_of_graph(load_yaml(GRAPH_FILE), load_yaml(PARAMS_FILE)))
    require_models_on_the_way(params)
    require_readable_reward_models(params)
    require_held_out_metrics(params)
    require_validation_metrics(params)
    scratch_root()
    warnings: list[str] = []
    for facts, name in known_models(base):
        warnings += require_model_fits(facts, name, params, runtimes)
    return warnings
