"""What a model's config.json says, and what the installed transformers knows of its architecture, without torch.

transformers offers the latter only where torch is loaded, which takes seconds, so its sources are read and not run.
"""

import ast
import importlib.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from stages.lib.command.errors import StageError
from stages.lib.command.jsonl import read_json

MODEL_JSON = ("config.json", "generation_config.json")
TOKENIZER_JSON = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
LARGEST = 2**31 - 1  # ids are 32-bit
MOST_LAYERS = 10_000  # of a model that would be built before its weights, which are not there, are missed
# Names that architectures have for their sizes, none of which may be 0.
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
# Names that architectures have for what a norm adds to a variance, around 1e-5: much more, and it returns nothing.
NORM_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
# Types that number the positions of a sequence from the one after the pad token's id on, as fairseq did.
COUNT_FROM_PAD = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert"})
ALL_KERNELS = frozenset({"eager", "sdpa", "flash_attention_2"})
KERNEL_FLAGS = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}
CLASSIFIERS = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
CAUSAL_MODELS = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"


class ModelFacts(NamedTuple):
    """What must be known of a model before it is loaded."""

    model_type: str
    vocab_size: int | None  # rows of the embedding: ids are in range(vocab_size)
    positions: int | None  # None where the architecture has no limit
    has_classifier: bool  # a reward model can be made of it
    attention_kernels: frozenset[str]  # values of runtime.yaml: attention; all of them where that cannot be known


def require_json_objects(folder: Path, names: Iterable[str]) -> None:
    """Raise a StageError unless each of these files of a folder, if it is there, holds a JSON object."""
    for file in (folder / name for name in names):
        if file.exists():
            if not file.is_file():
                raise StageError(f"{file} is not a file")
            read_object(file)


def read_object(file: Path) -> dict[str, Any]:
    value = read_json(file)
    if not isinstance(value, dict):
        raise StageError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder. Raises StageError if `folder` is not a model folder."""
    file = folder / "config.json"
    if not file.is_file():
        raise StageError(f"{folder} is not a model folder: {file} is missing")
    return read_object(file)


def read_model_facts(config: dict[str, Any], where: str = "config.json") -> ModelFacts:
    """The facts of a model by its config.json. Raises a StageError that begins with `where` for a value of no sense."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise StageError(f"{where}: expected a text as 'model_type', found {_shown(model_type)}")
    text_config = _checked(config, "text_config", dict, where) or {}
    config = {**config, **text_config}
    _bounded(config, "num_hidden_layers", MOST_LAYERS, where)
    for size in SIZES:
        if type(config.get(size)) is int and config[size] < 1:
            raise StageError(f"{where}: expected at least 1 as '{size}', found {config[size]}")
    for epsilon in NORM_EPSILONS:
        if type(config.get(epsilon)) in (int, float) and not 0 <= config[epsilon] < 1:
            found = _shown(config[epsilon])
            raise StageError(f"{where}: expected a number from 0 to below 1 as '{epsilon}', found {found}")
    own_code = _checked(config, "auto_map", dict, where) or {}
    return ModelFacts(
        model_type,
        _bounded(config, "vocab_size", LARGEST, where),
        longest_sequence(config, where),
        model_type in table(CLASSIFIERS) or "AutoModelForSequenceClassification" in own_code,
        attention_kernels(model_type),
    )


def longest_sequence(config: dict[str, Any], where: str = "config.json") -> int | None:
    """How long a sequence may be, by a model's config.json; None where the architecture has no limit.

    LongRoPE (arXiv 2402.13753) takes other factors in a forward pass with a longer sequence than the model was first
    trained on, for all sequences of that pass: a result would depend on the batch. So that is its limit here.
    """
    rope = _checked(config, "rope_parameters", dict, where) or _checked(config, "rope_scaling", dict, where) or {}
    original = "original_max_position_embeddings"
    if "longrope" in (rope.get("rope_type"), rope.get("type")):
        limit = _bounded(rope, original, LARGEST, where) or _bounded(config, original, LARGEST, where)
        if limit:
            return limit
    positions = _bounded(config, "max_position_embeddings", LARGEST, where) or _bounded(
        config, "n_positions", LARGEST, where
    )
    pad_id = config.get("pad_token_id")
    if positions and config.get("model_type") in COUNT_FROM_PAD:
        return positions - 1 - (pad_id if type(pad_id) is int else 1)
    return positions


def _bounded(config: dict[str, Any], key: str, largest: int, where: str) -> int | None:
    """A whole number from 1 to `largest`, or None if there is none. Raises StageError for anything else."""
    value = _checked(config, key, int, where)
    if value is not None and not 1 <= value <= largest:
        raise StageError(f"{where}: expected a whole number from 1 to {largest} as '{key}', found {_shown(value)}")
    return value


def _checked(config: dict[str, Any], key: str, kind: type, where: str) -> Any:
    value = config.get(key)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        names = {int: "a whole number", dict: "an object"}
        raise StageError(f"{where}: expected {names[kind]} as '{key}', found {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**100:
        return "a number of more than 100 digits"
    return "nothing" if value is None else repr(value)


@cache
def attention_kernels(model_type: str) -> frozenset[str]:
    """The kernels that the causal language model of a type computes attention with."""
    name = table(CAUSAL_MODELS).get(model_type)
    if name is None:
        return ALL_KERNELS
    module = table("SPECIAL_MODEL_TYPE_TO_MODULE_NAME").get(model_type, model_type.replace("-", "_"))
    flags = _class_flags(_library() / "models" / module, name)
    if flags is None:
        return ALL_KERNELS
    return frozenset({"eager", *(kernel for kernel, flag in KERNEL_FLAGS.items() if flags.get(flag))})


def _class_flags(folder: Path, name: str) -> dict[str, Any] | None:
    """The constants of a model's class and of the classes that it descends from; None if it is not in the folder."""
    trees = [_parsed(file) for file in sorted(folder.glob("modeling_*.py"))]
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    if name not in classes:
        return None
    flags: dict[str, Any] = {}
    pending = [name]
    while pending:
        node = classes.get(pending.pop(0))
        if node is None:
            continue
        for line in node.body:
            if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant):
                target = line.targets[0]
                if isinstance(target, ast.Name):
                    flags.setdefault(target.id, line.value.value)
        pending += [base.id for base in node.bases if isinstance(base, ast.Name)]
    return flags


@cache
def table(name: str) -> dict[str, Any]:
    """A table of transformers that says what there is for a model type."""
    for file in ("modeling_auto.py", "auto_mappings.py"):
        for node in _parsed(_library() / "models" / "auto" / file).body:
            if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Call):
                continue
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(target, ast.Name) and target.id == name:
                return dict(ast.literal_eval(node.value.args[0]))
    raise LookupError(f"transformers has no table {name}")


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _library() -> Path:
    spec = importlib.util.find_spec("transformers")
    folders = spec and spec.submodule_search_locations
    assert folders, "transformers is a package"
    return Path(folders[0])
