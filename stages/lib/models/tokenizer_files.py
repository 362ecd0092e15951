"""The files of a tokenizer in a model folder. All models of a pipeline hold the same ones, byte for byte."""

import shutil
from pathlib import Path

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import combined_hash, file_hash
from stages.lib.models.model_facts import read_config

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


def has_same_tokenizer(a: Path, b: Path) -> bool:
    """Whether two model folders have the same files of a tokenizer, byte for byte. False if one has not all of them."""
    files = [(a / name, b / name) for name in TOKENIZER_FILES]
    return all(one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes() for one, other in files)


def _tokenizer_file(folder: Path, name: str) -> Path:
    file = folder / name
    if not file.is_file():
        raise StageError(f"{folder} has no usable tokenizer: {file} is missing; prepare_base writes it")
    return file


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 over the three files of a model folder's tokenizer. Raises StageError if one is missing."""
    return combined_hash(file_hash(_tokenizer_file(folder, name)) for name in TOKENIZER_FILES)


def tokenizer_inputs(folder: Path) -> list[Path]:
    """The files of a model folder that say how text becomes ids, and what the ids of its padding and end are."""
    return [folder / name for name in (*TOKENIZER_FILES, "config.json")]


def require_tokens_of(tokens: Path, model: Path) -> None:
    """Raise a StageError unless a token table was made with the tokenizer of a model folder.

    Args:
        tokens: a table, or a folder with the tables of all splits.
    """
    from stages.lib.data.token_tables import TOKENIZER_NOTE, read_note

    read_config(model)  # what is not a model folder at all is called so
    expected = tokenizer_hash(model)
    for table in sorted(tokens.glob("*.arrow")) if tokens.is_dir() else [tokens]:
        found = read_note(table, TOKENIZER_NOTE)
        if found != expected:
            raise StageError(
                f"{table} was made with another tokenizer than that of {model} (hash {str(found)[:12]}, expected "
                f"{expected[:12]}); tokens and model must come from one models/base: run the stage tokenize_data again"
            )
