"""`runtime.yaml`: how a stage runs on this machine. Nothing here may change a result beyond rounding."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stages.lib.errors import StageError
from stages.lib.params import build, describe, load_yaml, nearest

RUNTIME_FILE = Path("runtime.yaml")
STAGES = (
    "train_sft",
    "train_rm",
    "ref_logprobs",
    "train_dpo",
    "train_ppo",
    "evaluate",
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
    "data_types",
    "communication_data_type",
    "torch_autocast",
    "amp",
    "compression_training",
    "progressive_layer_drop",
    "curriculum_learning",
    "data_efficiency",
    "sparse_attention",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}

TRACKER_NAME = re.compile(r"\w[\w .-]{0,99}")  # becomes a folder's name, and wandb refuses / \ # ? % :
TRACKED_FOLDERS = ("benchmarks", "data", "metrics", "models", "profiles", "stages", "tests")


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
    stop_seconds: float
    rows_per_partial_result: int
    log_seconds: float
    shown_samples: int
    kept_checkpoints: int
    resume_across_code_change: bool
    trackers: tuple[Literal["tensorboard", "wandb"], ...]
    tracker_folder: str
    tracker_project: str
    tracker_run: str | None
    tracker_tags: tuple[str, ...]
    wandb_mode: Literal["offline", "online", "disabled"]

    def __post_init__(self) -> None:
        at_least_1 = ("threads", "micro_batch_tokens", "logits_chunk_tokens", "generation_batch_size")
        for key in (*at_least_1, "rows_per_partial_result", "kept_checkpoints"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, found {getattr(self, key)}")
        for key in ("checkpoint_seconds", "stop_seconds", "log_seconds", "shown_samples"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must not be negative, found {getattr(self, key)}")
        if self.activation_offload and self.device == "cpu":
            raise ValueError("activation_offload needs a GPU, and device is cpu: set it to false")
        self._check_zero()
        self._check_trackers()

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
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(f"deepspeed.zero_optimization must hold keys, found {zero!r}")
        if "stage" in zero:
            raise ValueError("deepspeed.zero_optimization.stage: set zero_stage or frozen_zero_stage instead")
        rounded = sorted(key for key in zero if key.startswith("zero_quantized"))
        if rounded:
            raise ValueError(f"deepspeed.zero_optimization.{rounded[0]} would change results beyond rounding")
        for key in ("offload_optimizer", "offload_param"):
            if isinstance(zero.get(key), dict) and zero[key].get("device") == "nvme":
                raise ValueError(
                    f"deepspeed.zero_optimization.{key}: nvme is not supported; "
                    "offload_optimizer and offload_parameters offload to the CPU's memory"
                )

    def uses_deepspeed(self, world_size: int) -> bool:
        """True if a launch of so many processes trains with DeepSpeed."""
        wanted = world_size > 1 or self.zero_stage > 0 or bool(self.deepspeed)
        return self.engine == "deepspeed" or (self.engine == "auto" and wanted)

    def _check_trackers(self) -> None:
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers must name each tracker once, found {', '.join(self.trackers)}")
        for key in ("tracker_project", "tracker_run"):
            name = getattr(self, key)
            if name is not None and not TRACKER_NAME.fullmatch(name):
                raise ValueError(f"{key} must be up to 100 letters, digits, spaces, dots, - and _, found {name!r}")
        for tag in self.tracker_tags:
            if not 1 <= len(tag) <= 64:
                raise ValueError(f"tracker_tags must have 1 to 64 characters each, found {tag!r}")
        folder = Path(self.tracker_folder).resolve()
        if folder == Path.cwd():
            raise ValueError(f"tracker_folder must be a folder of its own, found {self.tracker_folder!r}")
        for name in TRACKED_FOLDERS:
            if folder.is_relative_to(Path(name).resolve()):
                raise ValueError(f"tracker_folder must not lie in {name}/, which DVC or Git tracks; runs/ is untracked")


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
