"""The files of a tokenizer in a model folder. All models of a pipeline hold the same ones, byte for byte."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from stages.lib.errors import StageError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files from one model folder to another. Raises StageError if one is missing."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(_tokenizer_file(source, name), target / name)


def require_same_tokenizer(a: Path, b: Path) -> None:
    """Raise a StageError that names both folders and the file, unless their tokenizers are equal byte for byte.

    A reward model that scores a policy's token ids must read them as the policy wrote them.
    """
    for name in TOKENIZER_FILES:
        if _tokenizer_file(a, name).read_bytes() != _tokenizer_file(b, name).read_bytes():
            raise StageError(
                f"{a} and {b} have different tokenizers: their {name} differ; "
                "models that share token ids must descend from one models/base"
            )


def _tokenizer_file(folder: Path, name: str) -> Path:
    file = folder / name
    if not file.is_file():
        raise StageError(f"{folder} has no usable tokenizer: {file} is missing; prepare_base writes it")
    return file


class ModelLimits(NamedTuple):
    """What a model's config.json says of its ids and positions."""

    vocab_size: int  # rows of the embedding: ids are in range(vocab_size)
    max_positions: int | None  # None where the architecture has no limit


def read_model_limits(folder: Path) -> ModelLimits:
    """Read the limits from `folder`/config.json. Raises StageError if it is missing, malformed or has no vocabulary."""
    file = folder / "config.json"
    if not file.is_file():
        raise StageError(f"{folder} is no model directory: {file} is missing")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise StageError(f"{file}, line {error.lineno}: not valid JSON ({error.msg})") from None
    config = {**config, **config.get("text_config", {})}
    if not isinstance(config.get("vocab_size"), int):
        raise StageError(f"{file}: expected a whole number as 'vocab_size', found {config.get('vocab_size')!r}")
    return ModelLimits(config["vocab_size"], longest_sequence(config))


def longest_sequence(config: dict[str, Any]) -> int | None:
    """How long a sequence may be, by a model's config.json; None where the architecture has no limit.

    LongRoPE (arXiv 2402.13753) takes other factors in a forward pass with a longer sequence than the model was first
    trained on, for all sequences of that pass: a result would depend on the batch. So that is its limit here.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) == "longrope":
        original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        if original:
            return original
    return config.get("max_position_embeddings") or config.get("n_positions")
