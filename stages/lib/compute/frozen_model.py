"""Models that nothing trains: no gradients, and sharded if runtime.yaml asks for it."""

from collections.abc import Callable

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
