"""What settings must say together: sections of params.yaml with each other, with runtime.yaml, and with the model.

Each check raises a StageError that names the keys, or returns warnings, before the first stage has run.
"""

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.command.quoted import nearest
from stages.lib.data.prepared_rows import SPLITS
from stages.lib.models.model_facts import ModelFacts
from stages.lib.operations.own_folders import real
from stages.lib.settings.lora import quantization_of_base
from stages.lib.settings.named_models import (
    TRAINED,
    is_there,
    reads_prepared_rows,
    require_kinds,
    require_like_reference,
    require_models,
    settings_by_key,
)
from stages.lib.settings.preference_agreement import require_what_losses_read
from stages.lib.settings.prepare_base import PrepareBase
from stages.lib.settings.prepare_data import PrepareData
from stages.lib.settings.reward_loss import RegressionLoss
from stages.lib.settings.rounds import require_rounds
from stages.lib.settings.runtime import Runtime
from stages.lib.settings.source_agreement import may_have_margins, may_have_scores
from stages.lib.settings.sources import Sources

PREPARED = Path("data/prepared")
TEMPLATES = Path("stages/chat_templates")


def require_agreement(params: Mapping[str, Any], runtimes: Mapping[str, Runtime]) -> None:
    """Raise StageError where two sections of params.yaml, or one and runtime.yaml, cannot both be obeyed."""
    require_models(params)
    require_kinds(params)
    require_like_reference(params)
    require_rounds(params)
    require_what_losses_read(params)
    for name, settings in params["train_rm"].items():
        if not reads_prepared_rows(settings):
            continue
        if isinstance(settings.loss, RegressionLoss) and not may_have_scores(params["sources"]):
            raise StageError(
                f"params.yaml: train_rm.{name}.loss: regression needs scores, which no source of kind unpaired has; "
                "name their column in the threshold of a source"
            )
        if getattr(settings.loss, "use_margin", False) and not may_have_margins(params["sources"]):
            raise StageError(f"params.yaml: train_rm.{name}.loss.use_margin: the pairs of sources.tasks have no margin")
    for stage, runtime in runtimes.items():
        where = f"runtime.yaml: {stage}"
        for place, settings in settings_by_key(stage, params).items():
            require_reward_servers(settings, runtime, f"params.yaml: {place}")
            require_kernel(runtime, settings.precision, where)
            if stage in TRAINED:
                require_engine(runtime, settings.precision, where)
                require_optimizers(settings, runtime, where)
            require_unsharded_quantization(stage, settings, runtime, where)
            if getattr(settings, "reference_reset", None) and runtime.frozen_zero_stage == 3:
                raise StageError(
                    f"{where}: frozen_zero_stage: 3 shards the reference, which reference_reset fills; use 0"
                )


def require_kernel(runtime: Runtime, precision: str, where: str) -> None:
    if runtime.attention == "flash_attention_2" and runtime.device == "cpu":
        raise StageError(f"{where}: attention: flash_attention_2 needs a GPU; set device: cuda, or attention: sdpa")
    if runtime.attention == "flash_attention_2" and precision != "bf16":
        raise StageError(
            f"{where}: attention: flash_attention_2 computes in bf16, not in {precision}; set the stage's precision in "
            "params.yaml to bf16, or attention to sdpa"
        )


def require_engine(runtime: Runtime, precision: str, where: str) -> None:
    """DeepSpeed without ZeRO does not add up bf16 gradients in float32."""
    if precision != "bf16" or runtime.zero_stage > 0:
        return
    if runtime.engine == "deepspeed":
        raise StageError(f"{where}: engine: deepspeed cannot train in bf16 with zero_stage: 0; set it to 1, 2 or 3")
    if runtime.deepspeed and runtime.frozen_zero_stage != 3:
        raise StageError(f"{where}: deepspeed: in bf16 these keys need zero_stage 1, 2 or 3")


def require_optimizers(settings: Any, runtime: Runtime, where: str) -> None:
    """bitsandbytes needs plain torch, and a GPU to page memory."""
    own = {key: getattr(settings, key, None) for key in ("optimizer", "policy_optimizer")}
    own["critic.optimizer"] = getattr(getattr(settings, "critic", None), "optimizer", None)
    for key, optimizer in own.items():
        held = optimizer.moments if optimizer else "float32"
        if held != "float32" and runtime.uses_deepspeed(1):
            raise StageError(
                f"{where}: {key}.moments: {held} needs plain torch; set engine: torch, or moments: float32"
            )
        if held.startswith("paged") and runtime.device == "cpu":
            raise StageError(f"{where}: {key}.moments: {held} needs a GPU; set device: cuda, or float32")


def require_unsharded_quantization(stage: str, settings: Any, runtime: Runtime, where: str) -> None:
    own = getattr(settings, "base_quantization", None) or quantization_of_base(getattr(settings, "lora", None))
    zero = "zero_stage" if stage in TRAINED else "frozen_zero_stage"
    if own and getattr(runtime, zero) == 3:
        raise StageError(f"{where}: {zero}: 3 cannot shard a base of base_quantization: {own}; use 0, 1 or 2")


def require_reward_servers(settings: Any, runtime: Runtime, where: str) -> None:
    for name, reward in getattr(settings, "rewards", {}).items():
        server = getattr(reward, "server", None)
        if server is not None and server not in runtime.reward_servers:
            raise StageError(
                f"{where}.rewards.{name}.server: runtime.yaml: reward_servers has no '{server}'"
                f"{nearest(server, runtime.reward_servers)}; it is to say where that server is"
            )


def require_paths(sources: Sources, data: PrepareData, base: PrepareBase, outs: Iterable[str]) -> None:
    """Raise StageError where a path of params.yaml is not there, or is what a stage writes.

    Args:
        outs: paths of dvc.yaml's outs, a matrix's cut off before its item.
    """
    own = [Path(out) for out in outs]
    for name, source in sources.files.items():
        refuse_what_a_stage_writes(source.path, own, f"sources.files.{name}.path")
        require_there(source.path, f"sources.files.{name}.path")
    for name, model in base.scratch.items():
        require_corpus(model.corpus, own, data.kinds, f"prepare_base.scratch.{name}.corpus")
    for name, model in base.files.items():
        refuse_what_a_stage_writes(model.path, own, f"prepare_base.files.{name}.path")
        require_there(model.path, f"prepare_base.files.{name}.path")
    for group in ("scratch", "files", "hub"):
        for name, model in getattr(base, group).items():
            require_template(model.chat_template, f"prepare_base.{group}.{name}.chat_template")


def require_corpus(path: str, outs: list[Path], kinds: Collection[str], key: str) -> None:
    """Raise StageError unless a tokenizer's corpus is there, or is a file that prepare_data writes."""
    normal = Path(os.path.normpath(path))
    if not normal.is_relative_to(PREPARED):
        refuse_what_a_stage_writes(path, outs, key)
        require_there(path, key)
    elif normal.suffix != ".jsonl" or normal.stem not in kinds or normal.parent.name not in SPLITS:
        known = ", ".join(f"{PREPARED}/train/{kind}.jsonl" for kind in kinds)
        raise StageError(f"params.yaml: {key}: prepare_data writes no {path}; it is to write {known}")


def require_template(name: str | None, key: str) -> None:
    """Raise StageError unless there is such a file of the folder that the first stage of the graph depends on."""
    if name is not None and not (TEMPLATES / name).is_file():
        there = ", ".join(sorted(file.name for file in TEMPLATES.glob("*.jinja")))
        raise StageError(f"params.yaml: {key}: {TEMPLATES} has no file {name}; put it there, or name one of {there}")


def refuse_what_a_stage_writes(path: str, outs: list[Path], key: str) -> None:
    top = Path.cwd()
    for found in (Path(os.path.normpath(top / path)), real(Path(path))):
        for out in outs:
            if found.is_relative_to(top / out) or (top / out).is_relative_to(found):
                raise StageError(
                    f"params.yaml: {key}: {path} is, holds or lies in what a stage writes ({out}); keep it elsewhere"
                )


def require_there(path: str, key: str) -> None:
    """Raise StageError unless a path is there, or DVC can bring it (a .dvc file of it, or of a folder above it)."""
    if not is_there(path) and not any(is_there(f"{folder}.dvc") for folder in (path, *Path(path).parents)):
        raise StageError(f"params.yaml: {key}: {path} does not exist")


def require_model_fits(
    facts: ModelFacts, name: str, params: Mapping[str, Any], runtimes: Mapping[str, Runtime]
) -> list[str]:
    """Raise StageError where a model cannot be trained with these settings. Returns warnings."""
    if facts.positions is not None:
        require_positions(facts.positions, name, params)
    for stage, runtime in runtimes.items():
        if runtime.attention not in facts.attention_kernels:
            known = " or ".join(sorted(facts.attention_kernels))
            raise StageError(
                f"runtime.yaml: {stage}: attention: {runtime.attention} is not there for models of type "
                f"{facts.model_type}, as {name} is; set it to {known}"
            )
    return [] if facts.has_classifier else [no_classifier(facts, name)]


def require_positions(positions: int, name: str, params: Mapping[str, Any]) -> None:
    limits = params["tokenize_data"]
    needed = {"tokenize_data.max_length": limits.max_length} | {
        f"tokenize_data.max_prompt_length + {key}.max_new_tokens": limits.max_prompt_length + settings.max_new_tokens
        for section in params
        for key, settings in settings_by_key(section, params).items()
        if hasattr(settings, "max_new_tokens")
    }
    for keys, tokens in needed.items():
        if tokens > positions:
            raise StageError(f"params.yaml: {keys} is {tokens}, but {name} has {positions} positions; lower it")


def no_classifier(facts: ModelFacts, name: str) -> str:
    return (
        f"models of type {facts.model_type}, as {name} is, have no sequence classifier in transformers: SFT and DPO "
        "work, but train_rm, and the critic of train_ppo, cannot start from it"
    )
