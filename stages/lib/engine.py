"""One optimizer over one module, on any number of processes: gradients in float32, summed, clipped, applied.

The caller divides its loss by the global denominator of the optimizer step (tokens or pairs over all micro-batches and
processes), so gradients are summed, never averaged, and neither micro-batching nor sharding changes a step.
"""

import math
from typing import Any

import torch
from torch import nn

from stages.lib.errors import StageError
from stages.lib.optimizer_settings import OptimizerSettings
from stages.lib.processes import Processes
from stages.lib.schedule import learning_rate


class Engine:
    """AdamW (arXiv 1711.05101) with a learning-rate schedule and gradient clipping.

    In bf16 the module holds bf16 weights and the optimizer float32 masters: gradients are added up in float32, and a
    step rounds the masters into the module. In fp32 the weights are their own masters.

    Args:
        module: called like a function; all its parameters that require a gradient are trained.
        total_steps: optimizer steps of the whole run, the horizon of the schedule.
    """

    def __init__(self, module: nn.Module, settings: OptimizerSettings, total_steps: int, processes: Processes) -> None:
        self.module = module
        self.settings = settings
        self.total_steps = total_steps
        self.processes = processes
        self.steps_taken = 0
        named = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
        self.weights = [weight for _, weight in named]
        self.masters = [
            weight if weight.dtype == torch.float32 else weight.detach().float().clone() for weight in self.weights
        ]
        self.optimizer = torch.optim.AdamW(
            self._groups(), lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=True
        )

    def _groups(self) -> list[dict[str, Any]]:
        """Weight decay on matrices only: not on norms and biases."""
        matrices = [master for master in self.masters if master.ndim >= 2]
        vectors = [master for master in self.masters if master.ndim < 2]
        groups = [(matrices, self.settings.weight_decay), (vectors, 0.0)]
        return [{"params": group, "weight_decay": decay} for group, decay in groups if group]

    def __call__(self, *inputs: torch.Tensor) -> Any:
        return self.module(*inputs)

    @property
    def learning_rate(self) -> float:
        """The rate of the coming step."""
        step = min(self.steps_taken, self.total_steps - 1)
        settings = self.settings
        return learning_rate(
            step,
            self.total_steps,
            settings.learning_rate,
            settings.warmup_ratio,
            settings.min_learning_rate_ratio,
            settings.schedule,
        )

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of one micro-batch's part of the loss (already divided by the global denominator)."""
        loss.backward()
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight is not master and weight.grad is not None:
                gradient = weight.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                weight.grad = None

    def step(self) -> float:
        """Sum the gradients over processes, clip and apply them. Returns their global L2 norm before clipping.

        Raises:
            StageError: the norm is not finite; the weights are left as they were.
        """
        self._sum_gradients()
        gradients = [master.grad for master in self.masters]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        require_finite(norm, "gradient norm", self.steps_taken)
        torch.nn.utils.clip_grads_with_norm_(self.masters, self.settings.max_grad_norm, torch.tensor(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._round_masters()
        self.steps_taken += 1
        return norm

    def discard_gradients(self) -> None:
        """Forget what `backward` has added up since the last step."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.grad = master.grad = None

    def _sum_gradients(self) -> None:
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        if self.processes.world_size > 1:
            flat = torch.cat([master.grad.flatten() for master in self.masters])
            self.processes.sum_tensor(flat)
            for master, part in zip(self.masters, flat.split([m.numel() for m in self.masters]), strict=True):
                master.grad.copy_(part.view_as(master))

    def _round_masters(self) -> None:
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                if weight is not master:
                    weight.copy_(master)

    def master_weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The state dict of `model` (the engine's module or a part of it), trained weights in float32."""
        masters = {id(weight): master for weight, master in zip(self.weights, self.masters, strict=True)}
        return {
            name: masters.get(id(weight), weight).detach() for name, weight in model.state_dict(keep_vars=True).items()
        }

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on: masters, optimizer, step count."""
        return {
            "masters": [master.detach() for master in self.masters],
            "optimizer": self.optimizer.state_dict(),
            "steps_taken": self.steps_taken,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for master, saved in zip(self.masters, state["masters"], strict=True):
                master.copy_(saved)
        self._round_masters()
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_taken = state["steps_taken"]


def require_finite(value: float, name: str, step: int) -> None:
    """Raise StageError if a loss or norm is not a finite number (all processes hold the same value)."""
    if not math.isfinite(value):
        raise StageError(
            f"{name} is {value} at optimizer step {step + 1}: training has diverged; lower the learning rate, or look "
            "for a broken row in the data. Earlier checkpoints are kept"
        )
