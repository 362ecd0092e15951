"""`runtime.yaml`: how a stage runs on this machine. Nothing here may change a result beyond rounding."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from stages.lib.command.errors import StageError
from stages.lib.command.params import build, describe, load_yaml, nearest
from stages.lib.command.strict_yaml import short
from stages.lib.operations.own_folders import require_folder_of_its_own, require_within_project
from stages.lib.settings.bounds import Count, NotNegative, WholeNumber

RUNTIME_FILE = Path("runtime.yaml")
# The stages that launch.sh starts, each with a section of its own name.
STAGES = (
    "train_sft",
    "train_rm",
    "ref_logprobs",
    "train_dpo",
    "train_ppo",
    "train_grpo",
    "evaluate",
)
FORMER_NAMES = {"precompute_ref_logprobs": "ref_logprobs", "evaluate_policy": "evaluate"}
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


@dataclass(frozen=True)
class Runtime:
    """One stage's view of `runtime.yaml`; the file explains each key."""

    device: Literal["auto", "cpu", "cuda"]
    threads: Annotated[int, Ge(1), Le(4096)]  # each is one of the operating system's
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    gradient_checkpointing: bool
    activation_offload: bool
    packing: bool
    micro_batch_tokens: Count
    logits_chunk_tokens: Count
    generation_batch_size: Count
    on_out_of_memory: Literal["stop", "retry"]
    engine: Literal["auto", "torch", "deepspeed"]
    zero_stage: Literal[0, 1, 2, 3]
    offload_optimizer: bool
    offload_parameters: bool
    frozen_zero_stage: Literal[0, 3]
    frozen_offload_parameters: bool
    deepspeed: dict[str, Any]
    checkpoint_seconds: NotNegative
    stop_seconds: NotNegative
    rows_per_partial_result: Count
    log_seconds: NotNegative
    shown_samples: WholeNumber
    kept_checkpoints: Count
    resume_across_code_change: bool
    trackers: tuple[Literal["tensorboard", "wandb"], ...]
    tracker_folder: str
    tracker_project: str
    tracker_run: str | None
    tracker_tags: tuple[str, ...]
    wandb_mode: Literal["offline", "online", "disabled"]

    def __post_init__(self) -> None:
        if self.activation_offload and self.device == "cpu":
            raise ValueError("activation_offload needs a GPU, and device is cpu: set it to false")
        self._check_zero()
        self._check_retry()
        self._check_trackers()

    def _check_zero(self) -> None:
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

    def _check_retry(self) -> None:
        """A pass that was broken off leaves no trace in plain torch; in ZeRO it leaves weights gathered."""
        if self.on_out_of_memory == "retry" and (self.uses_deepspeed(1) or self.frozen_zero_stage):
            raise ValueError(
                "on_out_of_memory: retry needs plain torch: set engine: auto, zero_stage: 0, frozen_zero_stage: 0 and "
                "deepspeed: {}, or on_out_of_memory: stop"
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
        require_folder_of_its_own(Path(self.tracker_folder), "runtime.yaml: tracker_folder", (".scratch",))
        require_within_project(Path(self.tracker_folder), "runtime.yaml: tracker_folder")


def read_runtime(stage: str, path: Path = RUNTIME_FILE) -> Runtime:
    """Read the `default` section with the overrides of `stage`. Raises StageError for an unknown section or key."""
    return runtime_of(stage, load_yaml(path), path)


def read_runtimes(path: Path = RUNTIME_FILE) -> dict[str, Runtime]:
    """The same for every stage that has a section, by its name."""
    document = load_yaml(path)
    return {stage: runtime_of(stage, document, path) for stage in STAGES}


def runtime_of(stage: str, document: dict[str, Any], path: Path) -> Runtime:
    for section in document:
        if section not in ("default", *STAGES):
            name = FORMER_NAMES.get(section)
            hint = f"; it is called {name} now, as the stage is" if name else nearest(section, STAGES)
            raise StageError(f"{path}: no stage is named '{short(section)}'{hint}")
    sections = [{} if document.get(name) is None else document[name] for name in ("default", stage)]
    for section, values in zip(("default", stage), sections, strict=True):
        if not isinstance(values, dict):
            raise StageError(f"{path}: {section}: expected keys, found {describe(values)}")
    return build(Runtime, sections[0] | sections[1], f"{path}: {stage}")
