"""One optimizer over one module, on any number of processes: gradients in float32, summed, clipped, applied.

The caller divides its loss by the global denominator of the optimizer step (tokens or pairs over all micro-batches and
processes), so gradients are summed, never averaged, and neither micro-batching nor sharding changes a step.

`choice.new_engine` chooses between the two backends; nothing above this folder knows which.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from stages.lib.command.errors import StageError
from stages.lib.compute.activation_offload import offloaded_activations
from stages.lib.compute.averaging_adamw import AVERAGE, AveragingAdamW
from stages.lib.compute.low_memory_adamw import WHOLE, new_low_memory_adamw, states_made
from stages.lib.compute.processes import Processes
from stages.lib.compute.schedule import learning_rate
from stages.lib.settings.optimizer import OptimizerSettings
from stages.lib.settings.runtime import Runtime

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's running means of the gradient and of its square
PIECE = 2**24  # numbers that are exchanged at a time


class Engine(ABC):
    """AdamW (arXiv 1711.05101) with a learning-rate schedule and gradient clipping.

    In bf16 the module holds bf16 weights and the optimizer float32 masters: gradients are added up in float32, and a
    step rounds the masters into the module. In fp32 the weights are their own masters.

    Every method is called by all processes of the launch.

    Args:
        module: called like a function; all its parameters that require a gradient are trained.
        total_steps: optimizer steps of the whole run, the horizon of the schedule; see `expect`.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: OptimizerSettings,
        total_steps: int,
        runtime: Runtime,
        processes: Processes,
    ) -> None:
        self.module = module
        self.settings = settings
        self.total_steps = total_steps
        self.runtime = runtime
        self.processes = processes
        self.steps_taken = 0
        self.changes = 0  # of the weights in this process's life, by which a copy of them knows that it is stale
        self.trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        averaged = settings.ema_decay is not None
        self.kept_states = (*MOMENTS, AVERAGE) if averaged else MOMENTS
        self._prepare()

    @abstractmethod
    def _prepare(self) -> None:
        """Make the optimizer, and whatever the back wraps around it."""

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        offload = self.runtime.activation_offload and torch.is_grad_enabled()
        with offloaded_activations() if offload else nullcontext():
            return self._forward(*inputs, **options)

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

    def expect(self, steps: int) -> None:
        """Let the schedule end after so many more steps, whatever was planned before."""
        self.total_steps = self.steps_taken + steps

    def step(self) -> float:
        """Sum the gradients over processes, clip and apply them. Returns their global L2 norm before clipping.

        Raises:
            StageError: the norm is not finite, so the weights may be broken; nothing is saved from here on.
        """
        norm = self._apply()
        require_finite(norm, "gradient norm", self.steps_taken)
        self.steps_taken += 1
        self.changes += 1
        return norm

    @abstractmethod
    def _forward(self, *inputs: Any, **options: Any) -> Any: ...

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of one micro-batch's part of the loss (already divided by the global denominator)."""

    def discard_gradients(self) -> None:
        """Forget what was added up since the last step, for a pass that is repeated: plain torch alone can."""
        raise NotImplementedError

    @abstractmethod
    def _apply(self) -> float:
        """What `step` does, but for the count."""

    @abstractmethod
    def full_state(self, name: str, key: str | None = None) -> torch.Tensor:
        """The float32 master of a trained parameter, or the state `key` that the optimizer has of it, whole."""

    @abstractmethod
    def set_full_state(self, name: str, value: torch.Tensor, key: str | None = None) -> None:
        """The reverse of `full_state`; `finish_loading` follows once all are set."""

    @abstractmethod
    def finish_loading(self) -> None:
        """Bring the module's weights in line with masters that were set."""

    def full_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """A tensor of the module that is not trained, whole."""
        return weight.detach()

    def master_weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The state dict of `model` (the engine's module or a part of it), trained weights in float32.

        Returns:
            In the main process all of it; tied weights are one tensor under two names. Elsewhere nothing.
        """
        names = {id(weight): name for name, weight in self.trained.items()}
        found: dict[int, torch.Tensor] = {}
        result = {}
        for name, weight in model.state_dict(keep_vars=True).items():
            if id(weight) not in found:
                trained = names.get(id(weight))
                found[id(weight)] = self.full_state(trained) if trained else self.full_weight(weight)
            if self.processes.is_main:
                result[name] = found[id(weight)].detach()
            else:
                found[id(weight)] = torch.empty(0)
        return result

    def state_dict(self) -> dict[str, Any]:
        """The small part of what a later process needs to go on; `tensors` is the large one."""
        return {"steps_taken": self.steps_taken}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Masters and optimizer states by name, whole, one at a time, for any number of processes and ZeRO stage."""
        for name in self.trained:
            yield name, self.full_state(name).detach()
            for key in self.saved_states(name):
                yield f"{name}/{key}", self.full_state(name, key).detach()

    def load_state_dict(self, state: dict[str, Any], read: Callable[[str], torch.Tensor]) -> None:
        """Go on from a saved state. `read` returns the tensor of a name that `tensors` gave, in all processes.

        Raises:
            StageError: a tensor has another shape than the weight it is of.
        """
        self.steps_taken = state["steps_taken"]
        self.changes += 1
        for name in self.trained:
            for key, shape in {None: self.full_shape(name), **self.saved_states(name)}.items():
                saved = f"{name}/{key}" if key else name
                value = read(saved)
                if value.shape != shape:
                    raise StageError(
                        f"the checkpoint holds {saved} in shape {tuple(value.shape)}, the model has {tuple(shape)}; "
                        "set runtime.yaml: resume_across_code_change: false"
                    )
                self.set_full_state(name, value, key)
        self.finish_loading()

    def saved_states(self, name: str) -> dict[str, torch.Size]:
        """The states of a trained parameter that a checkpoint holds, and their shapes; none before the first step."""
        return dict.fromkeys(self.kept_states, self.full_shape(name)) if self.steps_taken else {}

    def full_shape(self, name: str) -> torch.Size:
        """The shape of a trained parameter."""
        weight = self.trained[name]
        return getattr(weight, "ds_shape", weight.shape)  # of ZeRO 3's shards, that of the whole

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the module and the masters hold the average of the weights, where `ema_decay` asks for one.

        For evaluation and publishing: no step can be taken in it.
        """
        if AVERAGE not in self.kept_states or not self.steps_taken:
            yield
            return
        self._exchange_averages()
        yield  # not in a `try`: after an error the other processes are elsewhere, and nothing is saved from here on
        self._exchange_averages()

    @torch.no_grad()
    def _exchange_averages(self) -> None:
        optimizer, weights = self._optimized()
        for weight in weights:
            average = optimizer.state[weight][AVERAGE]
            # ZeRO has all its masters in one tensor or two, too large to be copied whole.
            for one, other in zip(weight.view(-1).split(PIECE), average.view(-1).split(PIECE), strict=True):
                held = one.clone()
                one.copy_(other)
                other.copy_(held)
        self.changes += 1
        self.finish_loading()

    @abstractmethod
    def _optimized(self) -> tuple[torch.optim.Optimizer, Iterable[torch.Tensor]]:
        """The optimizer and the tensors of this process that it has states of: the masters or its parts of them."""

    def new_optimizer(self, weights: dict[str, nn.Parameter | torch.Tensor]) -> Any:
        """AdamW with weight decay on matrices only, not on norms and biases; it averages where `ema_decay` says so."""
        settings = self.settings
        matrices = [weight for weight in weights.values() if weight.ndim >= 2]
        vectors = [weight for weight in weights.values() if weight.ndim < 2]
        groups: list[dict[str, Any]] = [
            {"params": group, "weight_decay": decay}
            for group, decay in ((matrices, settings.weight_decay), (vectors, 0.0))
            if group
        ]
        options: dict[str, Any] = {
            "lr": settings.learning_rate,
            "betas": (settings.beta1, settings.beta2),
            "eps": settings.epsilon,
        }
        if settings.moments != "float32":
            groups = self._embeddings_apart(groups, weights)
            return new_low_memory_adamw(groups, settings.moments, self.processes.device, **options)
        return AveragingAdamW(groups, settings.ema_decay, fused=True, **options)

    def _embeddings_apart(
        self, groups: list[dict[str, Any]], weights: dict[str, nn.Parameter | torch.Tensor]
    ) -> list[dict[str, Any]]:
        """The groups cut in two, of which the second holds embeddings."""
        embeddings = {f"{name}.weight" for name, part in self.module.named_modules() if isinstance(part, nn.Embedding)}
        apart = {id(weights[name]) for name in embeddings & weights.keys()}
        return [
            {**group, "params": members, WHOLE: whole}
            for group in groups
            for whole in (False, True)
            if (members := [weight for weight in group["params"] if (id(weight) in apart) == whole])
        ]

    def states_of(self, optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The optimizer's state of one of its tensors, made if there is none yet, at the count of steps taken."""
        if not isinstance(optimizer, torch.optim.AdamW):
            return states_made(optimizer, weight, self.steps_taken)
        state = optimizer.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            for key in self.kept_states:
                state[key] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        state["step"].fill_(float(self.steps_taken))
        return state


def require_finite(value: float, name: str, step: int) -> None:
    """Raise StageError if a loss or norm is not a finite number (all processes hold the same value)."""
    if not math.isfinite(value):
        raise StageError(
            f"{name} is {value} at optimizer step {step + 1}: training has diverged; lower the learning rate, or look "
            "for a broken row in the data. Earlier checkpoints are kept"
        )
