"""`runtime.yaml`: how a stage runs on this machine. Nothing here may change a result beyond rounding."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stages.lib.errors import StageError
from stages.lib.params import build, describe, load_yaml, nearest

RUNTIME_FILE = Path("runtime.yaml")
STAGES = (
    "train_sft",
    "train_rm",
    "precompute_ref_logprobs",
    "train_dpo",
    "train_ppo",
    "evaluate_policy",
)


@dataclass(frozen=True)
class Runtime:
    """One stage's view of `runtime.yaml`; the file explains each key."""

    device: Literal["auto", "cpu", "cuda"]
    threads: int
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    gradient_checkpointing: bool
    micro_batch_tokens: int
    logits_chunk_tokens: int
    generation_batch_size: int
    checkpoint_seconds: float
    rows_per_partial_result: int
    log_seconds: float
    shown_samples: int
    resume_across_code_change: bool

    def __post_init__(self) -> None:
        for key in (
            "threads",
            "micro_batch_tokens",
            "logits_chunk_tokens",
            "generation_batch_size",
            "rows_per_partial_result",
        ):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, found {getattr(self, key)}")


def read_runtime(stage: str, path: Path = RUNTIME_FILE) -> Runtime:
    """Read the `default` section with the overrides of `stage`. Raises StageError for an unknown section or key."""
    document = load_yaml(path)
    for section in document:
        if section not in ("default", *STAGES):
            raise StageError(f"{path}: no stage is named '{section}'{nearest(section, STAGES)}")
    sections = [document.get(section) or {} for section in ("default", stage)]
    for section, values in zip(("default", stage), sections, strict=True):
        if not isinstance(values, dict):
            raise StageError(f"{path}: {section}: expected keys, found {describe(values)}")
    return build(Runtime, sections[0] | sections[1], f"{path}: {stage}")
