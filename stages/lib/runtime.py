"""`runtime.yaml`: how a stage runs on this machine. Nothing here may change a result beyond rounding."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
# What params.yaml and the other keys decide.
OUR_DEEPSPEED_KEYS = {
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "gradient_accumulation_steps",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "managed_gradient_accumulation",
}


@dataclass(frozen=True)
class Runtime:
    """One stage's view of `runtime.yaml`; the file explains each key."""

    device: Literal["auto", "cpu", "cuda"]
    threads: int
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    gradient_checkpointing: bool
    activation_offload: bool
    packing: bool
    micro_batch_tokens: int
    logits_chunk_tokens: int
    generation_batch_size: int
    engine: Literal["auto", "torch", "deepspeed"]
    zero_stage: int
    offload_optimizer: bool
    offload_parameters: bool
    frozen_zero_stage: int
    frozen_offload_parameters: bool
    deepspeed: dict[str, Any]
    checkpoint_seconds: float
    log_seconds: float
    shown_samples: int
    resume_across_code_change: bool

    def __post_init__(self) -> None:
        for key in ("threads", "micro_batch_tokens", "logits_chunk_tokens", "generation_batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, found {getattr(self, key)}")
        self._check_zero()

    def _check_zero(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage must be 0, 1, 2 or 3, found {self.zero_stage}")
        if self.frozen_zero_stage not in (0, 3):
            raise ValueError(f"frozen_zero_stage must be 0 or 3, found {self.frozen_zero_stage}")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage: 3")
        if self.frozen_offload_parameters and self.frozen_zero_stage != 3:
            raise ValueError("frozen_offload_parameters needs frozen_zero_stage: 3")
        if self.engine == "torch" and (self.zero_stage or self.deepspeed):
            raise ValueError("engine: torch has no ZeRO: set zero_stage: 0 and deepspeed: {}, or engine: auto")
        taken = sorted(set(self.deepspeed) & OUR_DEEPSPEED_KEYS)
        if taken:
            raise ValueError(f"deepspeed.{taken[0]} is set by the pipeline and cannot be changed here")

    def uses_deepspeed(self, world_size: int) -> bool:
        """True if a launch of so many processes trains with DeepSpeed."""
        wanted = world_size > 1 or self.zero_stage > 0 or bool(self.deepspeed)
        return self.engine == "deepspeed" or (self.engine == "auto" and wanted)


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
