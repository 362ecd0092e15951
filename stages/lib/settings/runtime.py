"""`runtime.yaml`: how a stage runs on this machine. Nothing here may change a result beyond rounding."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import WithJsonSchema, model_validator

from stages.lib.command.errors import StageError
from stages.lib.command.params import build
from stages.lib.command.quoted import describe, nearest
from stages.lib.command.strict_yaml import load_yaml, short
from stages.lib.operations.own_folders import require_folder_of_its_own, require_within_project
from stages.lib.operations.stage_names import DATA_STAGES, STAGES
from stages.lib.operations.tracker import TrackerName
from stages.lib.settings.bounds import AnyValue, Count, Name, NotNegative, Several, Text, Whole, WholeNumber
from stages.lib.settings.declaration import Settings, block, key
from stages.lib.settings.reward_servers import RewardServer
from stages.lib.settings.sampling_process import SamplingProcessSettings
from stages.lib.settings.vllm_server import VllmServer

RUNTIME_FILE = Path("runtime.yaml")
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


class PassCost(Settings):
    """What a forward and backward pass costs, in the time of one token of many short sequences."""

    overhead: Count = key(100, "what a pass takes beyond its tokens", unit="tokens")
    attention: Count = key(1600, "length of a sequence whose attention takes as long as all else", unit="tokens")


class PassCosts(Settings):
    """The same for each kind of device."""

    cpu: PassCost = key(block(PassCost), "of a CPU: measured with 4 million parameters on two threads")
    gpu: PassCost = key(
        block(PassCost, overhead=1000, attention=8000), "of a GPU: not measured; by its launches of kernels"
    )


class Runtime(Settings):
    """How one stage runs on this machine, never what it computes."""

    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto: a GPU if there is one")
    threads: Annotated[int, Ge(1), Le(4096)] = key(  # each is one of the operating system's
        2, "CPU threads of a launch, shared out among its processes on one machine"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = key(
        "sdpa", "kernel; flash_attention_2: bf16, needs the flash-attn package and a GPU"
    )
    gradient_checkpointing: bool = key(
        False, "recompute activations in the backward pass: less memory, a third more time"
    )
    activation_offload: bool = key(False, "keep activations in the CPU's memory until the backward pass (GPU only)")
    packing: bool = key(
        False,
        "lay sequences end to end in one row instead of padding them; pays with flash_attention_2, not with sdpa, "
        "whose mask spans the whole row",
    )
    pad_to_multiple_of: Count = key(
        1, "the length of padded rows is a multiple of this; 8 or 64 suit the matrix units of GPUs", unit="tokens"
    )
    micro_batch_tokens: Count = key(
        8192, "at most in one forward and backward pass of one process", unit="padded tokens"
    )
    pass_cost: PassCosts = key(
        block(PassCosts), "by which rows of a step are cut into passes: padding, or one pass more (make pass-cost)"
    )
    share_prompts: bool = key(
        True, "a pair's prompt is computed once for both replies, where the model allows it and pass_cost gains by it"
    )
    logits_chunk_tokens: Count = key(4096, "whose whole-vocabulary logits exist at a time", unit="completion tokens")
    generation_batch_size: Count = key(128, "sampled at a time by one process", unit="sequences")
    on_out_of_memory: Literal["stop", "retry"] = key(
        "stop",
        "retry (one process): repeat the step at half the size, which stays in force and may move last digits",
    )
    engine: Literal["auto", "torch", "deepspeed"] = key(
        "auto", "auto: plain torch for one process without ZeRO, else DeepSpeed"
    )
    zero_stage: Annotated[Literal[0, 1, 2, 3], Whole] = key(
        0,
        "of trained models; 1 shards the optimizer, 2 also gradients, 3 also weights",
        source="arXiv 1910.02054",
    )
    offload_optimizer: bool = key(False, "keep masters and moments in the CPU's memory; needs zero_stage 1 to 3")
    offload_parameters: bool = key(False, "keep weights there too; needs zero_stage 3")
    frozen_zero_stage: Annotated[Literal[0, 3], Whole] = key(
        0, "of models without gradients: reference, reward model, evaluation"
    )
    frozen_offload_parameters: bool = key(False, "keep their weights in the CPU's memory; needs frozen_zero_stage 3")
    deepspeed: Annotated[dict[Text, AnyValue], WithJsonSchema({"type": "object"})] = key(
        {},
        "more of DeepSpeed's own configuration, such as {zero_optimization: {overlap_comm: true}}",
    )
    checkpoint_seconds: NotNegative = key(
        60.0,
        "between two training checkpoints, or ten times what saving one takes, if that is more; 0: one a step",
        unit="seconds",
    )
    stop_seconds: NotNegative = key(
        20.0,
        "that SIGTERM or Ctrl-C leaves for coming to a place to save; torchrun kills after 30, Slurm as `--signal` "
        "says",
        unit="seconds",
    )
    rows_per_partial_result: Count = key(
        512,
        "that stages which train nothing compute before they keep them in the scratch folder",
        unit="rows or prompts",
    )
    workers: Count | None = key(
        None,
        "that tokenize_data encodes on, with one thread each, and that a reward function runs in; null: as many as "
        "there are cores",
        unit="processes",
    )
    log_seconds: NotNegative = key(
        5.0, "between two progress lines in a log (a terminal is refreshed each step)", unit="seconds"
    )
    shown_samples: WholeNumber = key(
        1,
        "that train_ppo and train_grpo print after a phase; sample_pairs shows the rows of as many prompts, "
        "train_sft, train_dpo and train_unpaired as many replies to held-out prompts at each evaluation",
        unit="rollouts",
    )
    kept_checkpoints: Count = key(2, "training checkpoints that stay in the scratch folder")
    resume_across_code_change: bool = key(
        False, "let a killed run go on from its checkpoint although the code has changed since"
    )
    reward_servers: dict[Name, RewardServer] = key(
        {}, "where rewards of the types remote and judge are asked, by the name that params.yaml has for a server"
    )
    sampling_process: SamplingProcessSettings = key(
        block(SamplingProcessSettings),
        "that samples a phase ahead, where an entry is asynchronous and its sampler our own",
    )
    vllm: VllmServer = key(block(VllmServer), "the server of samplers of type vllm")
    trackers: Several[TrackerName] = key([], "where a curve goes beside its CSV: one, both or none")
    tracker_folder: Text = key(
        "runs",
        "event files and wandb's folders, in the project (a link may lead elsewhere); Git and DVC ignore runs/",
    )
    tracker_project: Text = key("stagewise", "wandb's project")
    tracker_run: Text | None = key(None, "a run is named <stage>-<this>; null: <stage>-<time of its start>")
    tracker_tags: Several[Text] = key([], "of a wandb run")
    wandb_mode: Literal["offline", "online", "disabled"] = key(
        "offline", "offline: upload later with `wandb sync` | online: after `wandb login`"
    )

    @model_validator(mode="after")
    def _check(self) -> "Runtime":
        if self.activation_offload and self.device == "cpu":
            raise ValueError("activation_offload needs a GPU, and device is cpu: set it to false")
        if self.packing and self.pad_to_multiple_of > 1:
            raise ValueError("pad_to_multiple_of is of padded rows, and packing pads none: set 1, or packing: false")
        self._check_zero()
        self._check_retry()
        self._check_trackers()
        return self

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
        for part in ("offload_optimizer", "offload_param"):
            offload = zero.get(part)
            if isinstance(offload, dict) and offload.get("device") == "nvme":
                raise ValueError(
                    f"deepspeed.zero_optimization.{part}: nvme is not supported; "
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

    @property
    def worker_count(self) -> int:
        """`workers`, or the processors that this process may use."""
        known = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return self.workers or known or 1

    def _check_trackers(self) -> None:
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers must name each tracker once, found {', '.join(self.trackers)}")
        for field in ("tracker_project", "tracker_run"):
            name = getattr(self, field)
            if name is not None and not TRACKER_NAME.fullmatch(name):
                raise ValueError(f"{field} must be up to 100 letters, digits, spaces, dots, - and _, found {name!r}")
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
        if section not in ("default", *STAGES, *DATA_STAGES):
            name = FORMER_NAMES.get(section)
            hint = f"; it is called {name} now, as the stage is" if name else nearest(section, STAGES)
            raise StageError(f"{path}: no stage is named '{short(section)}'{hint}")
    sections = [{} if document.get(name) is None else document[name] for name in ("default", stage)]
    for section, values in zip(("default", stage), sections, strict=True):
        if not isinstance(values, dict):
            raise StageError(f"{path}: {section}: expected keys, found {describe(values)}")
    return build(Runtime, sections[0] | sections[1], f"{path}: {stage}")
