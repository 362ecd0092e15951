"""All of params.yaml: which class reads which section, and what the top-level values are."""

from pathlib import Path
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.command.params import PARAMS_FILE, Seed, build, convert, nearest
from stages.lib.command.strict_yaml import load_yaml, short
from stages.lib.settings.evaluate import Evaluate
from stages.lib.settings.prepare_base import PrepareBase
from stages.lib.settings.prepare_data import PrepareData
from stages.lib.settings.ref_logprobs import RefLogprobs
from stages.lib.settings.tokenize_data import Tokenize
from stages.lib.settings.train_dpo import TrainDpo
from stages.lib.settings.train_grpo import TrainGrpo
from stages.lib.settings.train_ppo import TrainPpo
from stages.lib.settings.train_rm import TrainRm
from stages.lib.settings.train_sft import TrainSft

SECTIONS = {
    "prepare_data": PrepareData,
    "prepare_base": PrepareBase,
    "tokenize_data": Tokenize,
    "train_sft": TrainSft,
    "train_rm": TrainRm,
    "ref_logprobs": RefLogprobs,
    "train_dpo": TrainDpo,
    "train_ppo": TrainPpo,
    "train_grpo": TrainGrpo,
    "evaluate": Evaluate,
}
VALUES = {"seed": Seed, "trust_remote_code": bool}


def read_all_params(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """Every section as its settings, and every top-level value. Raises StageError as `read_params` does."""
    document = load_yaml(path)
    known = [*VALUES, *SECTIONS]
    for key in document:
        if key not in known:
            raise StageError(f"{path}: no stage reads '{short(key)}'{nearest(key, known)}")
    for key in known:
        if key not in document:
            raise StageError(f"{path}: {key} is missing{nearest(key, document)}")
    values = {key: convert(document[key], kind, f"{path}: {key}") for key, kind in VALUES.items()}
    return values | {key: build(kind, document[key], f"{path}: {key}") for key, kind in SECTIONS.items()}
