"""Which engine trains a module: plain torch for one process, DeepSpeed for several or where its ZeRO is asked for."""

import torch
from torch import nn

from stages.lib.command.errors import StageError
from stages.lib.compute.engine.base import Engine
from stages.lib.compute.engine.torch import TorchEngine
from stages.lib.compute.processes import Processes
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.runtime import Runtime


def new_engine(
    module: nn.Module, settings: OptimizerSettings, total_steps: int, runtime: Runtime, processes: Processes
) -> Engine:
    """An engine with the back that `runtime.yaml` and the launch ask for."""
    # DeepSpeed without ZeRO does not add up bf16 gradients in float32, which this engine promises.
    half = any(weight.dtype == torch.bfloat16 for weight in module.parameters() if weight.requires_grad)
    lacking = half and runtime.zero_stage == 0
    if lacking and runtime.engine == "deepspeed":
        raise StageError("runtime.yaml: engine: deepspeed cannot train in bf16 with zero_stage: 0; set it to 1, 2 or 3")
    if lacking and runtime.deepspeed and runtime.frozen_zero_stage != 3:
        raise StageError("runtime.yaml: deepspeed: in bf16 these keys need zero_stage 1, 2 or 3")
    if runtime.uses_deepspeed(processes.world_size) and settings.moments != "float32":
        raise StageError(
            f"params.yaml: optimizer.moments: {settings.moments} needs plain torch, not DeepSpeed: set runtime.yaml: "
            "engine: torch, or moments: float32"
        )
    if runtime.uses_deepspeed(processes.world_size) and not lacking:
        from stages.lib.compute.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, settings, total_steps, runtime, processes)
    return TorchEngine(module, settings, total_steps, runtime, processes)
