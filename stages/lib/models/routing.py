"""What the routers of a mixture of experts decide in a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from stages.lib.command.errors import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Routing(NamedTuple):
    """The decisions of one router on the tokens of a pass, in the order of the flattened ids."""

    logits: torch.Tensor  # (tokens, experts), with gradient
    experts: torch.Tensor  # (tokens, k), the chosen ones, integers


def routers(model: "PreTrainedModel") -> list[tuple[nn.Module, int]]:
    """The routers of a model, in the order of its layers, each with the place of the logits in what it returns.

    They are those whose logits transformers itself records (`output_router_logits`), by the class of the module, so
    any family that it knows as a mixture of experts will do. A dense model has none.
    """
    return [
        (module, recorder.index)
        for recorder in _recorders(model)
        for module in model.modules()
        if isinstance(module, recorder.target_class)
    ]


def _recorders(model: "PreTrainedModel") -> list[Any]:
    found = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits", [])
    return found if isinstance(found, list) else [found]


@contextmanager
def recorded_routing(model: "PreTrainedModel") -> Iterator[list[Routing]]:
    """Within it every router adds a `Routing` to the list, for each pass.

    The hooks are gone at the end, so a layer that gradient checkpointing runs again in the backward pass adds nothing.
    They are set for each pass, behind those of DeepSpeed, whose outputs the backward pass must go through.

    Raises:
        StageError: a router does not return the experts that it has chosen.
    """
    found: list[Routing] = []

    def note(index: int, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        chosen = next((part for part in parts if not part.is_floating_point()), None)
        if chosen is None:
            kind = model.config.model_type
            raise StageError(f"params.yaml: router_loss: models of type {kind} do not tell which experts they choose")
        logits = parts[index]
        found.append(Routing(logits.reshape(-1, logits.shape[-1]), chosen.reshape(-1, chosen.shape[-1])))

    hooks = [
        router.register_forward_hook(lambda _module, _inputs, output, index=index: note(index, output))
        for router, index in routers(model)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
