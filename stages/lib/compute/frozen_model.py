"""Models that nothing trains: no gradients, and sharded if runtime.yaml asks for it."""

from collections.abc import Callable

import torch
from torch import nn

from stages.lib.compute.processes import Processes
from stages.lib.settings.runtime import Runtime


def frozen(module: nn.Module, runtime: Runtime, processes: Processes) -> Callable:
    """A module without gradients (reference, reward model, a policy under evaluation), sharded if so asked."""
    module.requires_grad_(False)
    module.eval()
    if runtime.frozen_zero_stage == 3:
        from stages.lib.compute.engine.deepspeed_setup import sharded

        return sharded(module, runtime, processes)
    return module


@torch.no_grad()
def fill(model: nn.Module, weight_of: Callable[[str], torch.Tensor]) -> None:
    """Give a frozen model, sharded or not, other weights. All processes call it together.

    Args:
        model: a module that `frozen` was called with, or a part of it.
        weight_of: the whole tensor of a name in the state dict, in all processes; asked in the order of that.
    """
    for name, held in model.state_dict(keep_vars=True).items():
        weight = weight_of(name)
        if not hasattr(held, "ds_id"):
            held.copy_(weight)
            continue
        import deepspeed

        with deepspeed.zero.GatheredParameters([held], modifier_rank=0):
            held.copy_(weight)
