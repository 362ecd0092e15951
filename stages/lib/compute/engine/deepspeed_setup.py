"""DeepSpeed started on a module: its configuration, weights handed out to the processes, frozen models under ZeRO 3."""

import io
import logging
import os
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn

from stages.lib.command.errors import StageError
from stages.lib.command.file_errors import NO_SPACE
from stages.lib.compute.processes import Processes
from stages.lib.models.quantization import quantized_layers
from stages.lib.operations.lost_contact import is_lost_contact
from stages.lib.settings.runtime import Runtime


def sharded(module: nn.Module, runtime: Runtime, processes: Processes) -> Callable:
    """A frozen module whose weights ZeRO 3 shards over the processes (and keeps on the CPU if so asked)."""
    require_whole_weights(module, 3)
    section: dict[str, Any] = {"stage": 3}
    if runtime.frozen_offload_parameters:
        section["offload_param"] = {"device": "cpu"}
    bf16 = next(module.parameters()).dtype == torch.bfloat16
    config = deepspeed_config({"bf16": {"enabled": bf16}, "zero_optimization": section}, runtime, processes)
    engine = initialize(module, config, processes)
    engine.eval()
    return engine


def _hand_out(module: nn.Module, config: dict[str, Any], processes: Processes) -> None:
    """Give each process its shards of the first one's weights, and its buffers whole.

    DeepSpeed does so by itself, but would put the whole model on the device before.

    Raises:
        StageError: the first process found other weights in the model's files than config.json tells the others of.
    """
    import deepspeed

    layout = {name: (weight.shape, weight.dtype) for name, weight in module.named_parameters()}
    first = processes.broadcast(layout if processes.is_main else None)
    if processes.any(first is None or list(layout.items()) != list(first.items())):
        raise StageError(
            "ZeRO 3 cannot hand out this model: its files hold other weights than its config.json tells of (is "
            "tie_word_embeddings right?); correct that, or set zero_stage and frozen_zero_stage below 3"
        )
    deepspeed.zero.Init(module, config_dict_or_path=config)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = processes.broadcast_tensor(buffer.cpu()).to(processes.device)


def require_whole_weights(module: nn.Module, stage: int) -> None:
    """Raise StageError where ZeRO 3 is to shard weights that are held in 4 bits, which it would destroy."""
    if stage == 3 and quantized_layers(module):
        raise StageError("runtime.yaml: ZeRO 3 cannot shard a base of base_quantization: nf4; use ZeRO 0, 1 or 2")


def deepspeed_config(own: dict[str, Any], runtime: Runtime, processes: Processes) -> "ReadKeys":
    """DeepSpeed's configuration: ours, with the keys of `runtime.yaml`'s `deepspeed` laid over it."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": processes.world_size,
        "managed_gradient_accumulation": False,  # the loop says when a step is complete
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        **own,
    }
    config["zero_optimization"]["overlap_comm"] = False
    return ReadKeys(_laid_over(config, runtime.deepspeed), runtime.deepspeed)


class ReadKeys(dict):
    """A configuration that remembers which of its keys were read; copies of it share that memory."""

    def __init__(self, values: dict[str, Any], given: dict[str, Any]) -> None:
        super().__init__(values)
        self.given = given  # by the user
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def _laid_over(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = dict(config)
    for key, value in changes.items():
        inner = result.get(key)
        result[key] = _laid_over(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


def is_no_keys_fault(error: Exception) -> bool:
    """No memory, no room on the disk, a lost process."""
    no_room = isinstance(error, OSError) and error.errno in NO_SPACE
    return no_room or isinstance(error, torch.OutOfMemoryError) or is_lost_contact(error)


def initialize(module: nn.Module, config: ReadKeys, processes: Processes, **options: Any) -> Any:
    """`deepspeed.initialize`, in the process group of the launch or in one of this process alone.

    Raises:
        StageError: DeepSpeed has no use for a key of `config`, or for its value.
    """
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed calls collectives of torch by names that torch means to drop.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    # On a CPU it would compile, for a minute at first use, a collective of inference that nothing here calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")  # a process without a launcher; DeepSpeed refuses to start without it
    if not dist.is_initialized():
        backend = "nccl" if processes.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with redirect_stdout(io.StringIO()):  # what it prints of itself and of memory
            if not deepspeed.comm.is_initialized():
                deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
            if config["zero_optimization"]["stage"] == 3:
                _hand_out(module, config, processes)
            engine = deepspeed.initialize(model=module, config=config, **options)[0]
    except ValidationError as error:
        wrong = error.errors()[0]
        key = "".join(f"{part}: " for part in wrong["loc"])
        raise StageError(f"runtime.yaml: deepspeed: {key}{wrong['msg']} ({error.title})") from None
    except StageError:
        raise
    except Exception as error:  # DeepSpeed checks some of its keys by assertions, some by whatever comes of them
        if not config.given or is_no_keys_fault(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StageError(f"runtime.yaml: deepspeed: DeepSpeed refuses {config.given} here: {reason}") from None
    unread = sorted(set(config) - config.read)
    if unread:
        raise StageError(f"runtime.yaml: deepspeed.{unread[0]}: DeepSpeed has no such key")
    return engine
