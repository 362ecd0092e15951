"""Frozen models that cost no memory: the base of a model with adapters, read with its adapters switched off."""

from typing import Any

import torch
from torch import nn

from stages.lib.lora import Lora


class WithoutAdapters(nn.Module):
    """What `module` computes with the adapters of `lora` switched off: a reference, or a reward model under its critic.

    Args:
        module: reads the model that `lora` is in; its parameters are shared, and never trained through this one.
    """

    def __init__(self, module: nn.Module, lora: Lora) -> None:
        super().__init__()
        self.module = module
        self.lora = lora

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        with self.lora.off():
            return self.module(*inputs)


class FirstHead(nn.Module):
    """A classifier that shares its body with another one, and keeps a frozen copy of the head that that one has now."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.config = classifier.config
        self.base_model = classifier.base_model
        weight = nn.Parameter(classifier.score.weight.detach().clone(), requires_grad=False)
        self.score = nn.Linear(weight.shape[1], 1, bias=False, device="meta")
        self.score.weight = weight
