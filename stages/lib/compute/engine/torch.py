"""The engine of plain torch: every process holds all of the model, gradients are summed over the processes."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from stages.lib.compute.engine.base import PIECE, Engine
from stages.lib.compute.low_memory_adamw import STATES
from stages.lib.compute.processes import Processes


class TorchEngine(Engine):
    """Plain torch: every process holds all of it, gradients are summed over them."""

    def _prepare(self) -> None:
        self.masters = {
            name: weight.detach().float().clone() if weight.dtype in (torch.bfloat16, torch.float16) else weight
            for name, weight in self.trained.items()
        }
        self.optimizer = self.new_optimizer(self.masters)

    def _forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        for name, weight in self.trained.items():
            master = self.masters[name]
            if weight is not master and weight.grad is not None:
                gradient = weight.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                weight.grad = None

    def _apply(self) -> float:
        masters = list(self.masters.values())
        sum_gradients(masters, self.processes)
        norm = torch.nn.utils.get_total_norm(gradients_of(masters))
        if not bool(torch.isfinite(norm)):
            return float(norm)
        torch.nn.utils.clip_grads_with_norm_(masters, self.settings.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.finish_loading()
        return float(norm)

    def discard_gradients(self) -> None:
        """Forget what was added up since the last step."""
        for weight in (*self.trained.values(), *self.masters.values()):
            weight.grad = None

    def _optimized(self) -> tuple[torch.optim.Optimizer, Iterable[torch.Tensor]]:
        return self.optimizer, self.masters.values()

    def full_state(self, name: str, key: str | None = None) -> torch.Tensor:
        master = self.masters[name]
        return master.detach() if key is None else self.optimizer.state[master][key]

    def set_full_state(self, name: str, value: torch.Tensor, key: str | None = None) -> None:
        master = self.masters[name]
        with torch.no_grad():
            (master if key is None else self.states_of(self.optimizer, master)[key]).copy_(value)

    def saved_states(self, name: str) -> dict[str, torch.Size]:
        if self.settings.moments == "float32" or not self.steps_taken:
            return super().saved_states(name)
        states = self.states_of(self.optimizer, self.masters[name])
        return {key: states[key].shape for key in STATES if key in states}

    def finish_loading(self) -> None:
        with torch.no_grad():
            for name, weight in self.trained.items():
                if weight is not self.masters[name]:
                    weight.copy_(self.masters[name])


def gradients_of(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients of these weights; one that has none gets zeros."""
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    return [weight.grad for weight in weights if weight.grad is not None]


def sum_gradients(weights: Sequence[torch.Tensor], processes: Processes) -> None:
    """Sum the gradients of these weights over the processes; one that has none gets zeros.

    Small ones are exchanged together, about `PIECE` numbers at a time, and large ones in place.
    """
    gradients = gradients_of(weights)
    if processes.world_size == 1:
        return
    gathered: list[torch.Tensor] = []
    room = PIECE
    for gradient in gradients:
        if gradient.numel() >= PIECE and gradient.is_contiguous():
            processes.sum_tensor(gradient)
            continue
        gathered.append(gradient)
        room -= gradient.numel()
        if room <= 0:
            _sum_together(gathered, processes)
            gathered, room = [], PIECE
    _sum_together(gathered, processes)


def _sum_together(tensors: list[torch.Tensor], processes: Processes) -> None:
    if not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    processes.sum_tensor(flat)
    for tensor, part in zip(tensors, flat.split([one.numel() for one in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
