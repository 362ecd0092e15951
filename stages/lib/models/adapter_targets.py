"""Which weights of a model get a low-rank adapter, by the names under which PEFT finds them.

transformers holds the experts of a layer in two parameters of three axes, (experts, out, in), and most routers in one
of their own. No layer of PEFT's fits these; it adapts them as parameters, each expert with an A and a B of its own.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from stages.lib.command.errors import StageError
from stages.lib.command.quoted import nearest
from stages.lib.models.routing import routers
from stages.lib.settings.lora import ALL_LINEAR, LoraSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# In a mixture of experts PEFT 0.21 takes these names of layers for those that experts and routers had before they were
# held together, and adapts those instead. Given as parameters, the layers of a shared expert, or of one of the body's
# layers without experts, are taken for what they are.
NAMES_OF_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


class AdapterTargets(NamedTuple):
    """What PEFT is asked for, and what stays as it is."""

    modules: list[str]
    parameters: list[str]
    left_out: str  # in words; empty where everything is adapted that the settings could name


def adapter_targets(model: "PreTrainedModel", settings: LoraSettings, source: Path) -> AdapterTargets:
    """Linear layers of the body by name, experts and routers by option.

    Neither the LM head, which may be tied to the embeddings, nor a scalar head, which is trained whole, can have an
    adapter.

    Args:
        source: the model's folder, for messages.
    Raises:
        StageError: a target fits no linear layer of the body, the message lists what there is; or the model has no
            experts, or no routers, that could be adapted.
    """
    experts, gates = parameters_of_experts(model), parameters_of_routers(model)
    modules = linear_targets(model, settings.targets, source)
    parameters: list[str] = []
    left_out = []
    if experts:
        renamed = [name for name in modules if name.rpartition(".")[2] in NAMES_OF_EXPERTS]
        modules = [name for name in modules if name not in renamed]
        if renamed and settings.base_quantization:
            left_out.append(f"{', '.join(renamed)} stay frozen, as PEFT takes them for experts' on a base in 4 bits")
        else:
            parameters = [f"{name}.weight" for name in renamed]
    for option, asked, found in (("experts", settings.experts, experts), ("routers", settings.routers, gates)):
        if asked and not found:
            raise StageError(f"params.yaml: lora.{option}: {source} has no {option} of a mixture of experts; set false")
        if asked:
            parameters += found
        elif found:
            size = sum(model.get_parameter(name).numel() for name in found)
            left_out.append(f"the {option} ({size:,} weights) stay frozen, as lora.{option} is false")
    return AdapterTargets(modules, sorted(parameters), "; ".join(left_out))


def parameters_of_experts(model: "PreTrainedModel") -> list[str]:
    """The names of the parameters that hold the weights of several experts."""
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        for own, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3
    ]


def parameters_of_routers(model: "PreTrainedModel") -> list[str]:
    """The names of the matrices of routers that are no linear layers, which `targets` would name."""
    found = {id(router) for router, _ in routers(model)}
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if id(module) in found and not is_linear(module)
        for own, weight in module.named_parameters(recurse=False)
        if weight.ndim == 2
    ]


def linear_targets(model: "PreTrainedModel", targets: str | tuple[str, ...], source: Path) -> list[str]:
    """The last parts of the names of all linear layers of the body, or the `targets`, of which each must fit one."""
    body = {id(module) for module in model.base_model.modules() if is_linear(module)}
    names = [name for name, module in model.named_modules() if id(module) in body]
    kinds = sorted({name.rpartition(".")[2] for name in names})
    if targets == ALL_LINEAR:
        return kinds
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise StageError(
                f"params.yaml: lora.targets: {source} has no linear layer '{target}' in its body"
                f"{nearest(target, kinds)}; there are {', '.join(kinds)}, or {ALL_LINEAR} for all of them"
            )
    return sorted(targets)


def is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)
