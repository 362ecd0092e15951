"""Activations that wait for the backward pass in the CPU's memory instead of the GPU's."""

import torch
from torch import nn


def offloaded_activations() -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which a forward pass saves its activations on the CPU; the backward pass brings each back.

    Weights stay where they are: they take no further memory, and under ZeRO 3 must not be kept beyond their layer.
    """
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def _pack(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
        return tensor.device, tensor
    if tensor.device.type == "cpu":
        return tensor.device, tensor
    kept = torch.empty(tensor.size(), dtype=tensor.dtype, layout=tensor.layout, pin_memory=not tensor.is_sparse)
    return tensor.device, kept.copy_(tensor)


def _unpack(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, tensor = packed
    return tensor.to(device, non_blocking=True)
