"""The check of all of params.yaml and runtime.yaml, with each other and with the base model, before anything runs."""

from pathlib import Path
from typing import Any

from stages.lib.command.params import GRAPH_FILE
from stages.lib.command.strict_yaml import load_yaml
from stages.lib.models.model_facts import ModelFacts, read_config, read_model_facts, read_object
from stages.lib.operations.scratch_root import scratch_root
from stages.lib.settings.agreement import require_agreement, require_model_fits, require_paths, warn_of_kinds
from stages.lib.settings.prepare_base import PrepareBase
from stages.lib.settings.runtime import read_runtimes
from stages.lib.settings.sections import read_all_params


def outs_of_graph(graph: dict[str, Any]) -> list[str]:
    """The paths that the stages write; of a matrix the part before its item."""
    stages = graph.get("stages", {}).values()
    entries = [entry for stage in stages for kind in ("outs", "metrics", "plots") for entry in stage.get(kind) or ()]
    paths = [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]
    return [path.partition("${")[0].rstrip("/") for path in paths]


def known_model(base: PrepareBase) -> tuple[ModelFacts, str] | None:
    """What is known of the base model before it is made, and its name; None of a Hub model that is not here yet."""
    readers = {"scratch": new_llama, "local": local_config, "hub": cached_config}
    found = readers[base.source](base)
    if found is None:
        return None
    config, name = found
    return read_model_facts(config, f"{name}: config.json"), name


def new_llama(base: PrepareBase) -> tuple[dict[str, Any], str]:
    sizes = base.scratch
    config = {"model_type": "llama", "vocab_size": sizes.vocab_size, "max_position_embeddings": sizes.max_positions}
    return config, "the new model (prepare_base.scratch)"


def local_config(base: PrepareBase) -> tuple[dict[str, Any], str] | None:
    """None if only DVC knows of the folder."""
    folder = Path(base.path)
    return (read_config(folder), base.path) if folder.exists() else None


def cached_config(base: PrepareBase) -> tuple[dict[str, Any], str] | None:
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(str(base.hub_model), "config.json", revision=base.hub_revision)
    return (read_object(Path(file)), f"Hub model {base.hub_model}") if isinstance(file, str) else None


def check_settings() -> list[str]:
    """Raise a StageError for the first fault. Returns warnings."""
    params, runtimes = read_all_params(), read_runtimes()
    data, base = params["prepare_data"], params["prepare_base"]
    require_agreement(params, runtimes)
    require_paths(data, base, outs_of_graph(load_yaml(GRAPH_FILE)))
    scratch_root()
    model = known_model(base)
    warnings = warn_of_kinds(data)
    return warnings if model is None else warnings + require_model_fits(*model, params, runtimes)
