"""Frozen models that cost no memory: the base of a model with adapters, read with its adapters switched off."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stages.lib.models.lora import Lora
from stages.lib.models.scalar_scores import ScalarHead


class WithoutAdapters:
    """What `module` computes with the adapters of `lora` switched off: a reference, or a reward model under its critic.

    Args:
        module: an engine around the model that `lora` is in, or a module that reads it; never trained through this one.
    """

    def __init__(self, module: Callable, lora: Lora) -> None:
        self.module = module
        self.lora = lora

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Any:
        with self.lora.off():
            return self.module(*inputs)


class FirstHead(nn.Module):
    """A classifier that shares its body with another one, and keeps a frozen copy of the head that that one has now."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.config = classifier.config
        self.base_model = classifier.base_model
        trained = classifier.get_submodule("score").parameters()
        self.score = ScalarHead(*(nn.Parameter(own.detach().clone(), requires_grad=False) for own in trained))
