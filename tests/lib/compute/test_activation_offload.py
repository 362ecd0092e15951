"""Activation offload without a GPU: its hooks are told that what lies on the CPU lies on one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from stages.lib.command.strict_yaml import load_yaml
from stages.lib.compute import activation_offload
from stages.lib.compute.engine.torch import TorchEngine
from stages.lib.settings.runtime import Runtime
from tests.lib.compute.test_engine import ALONE, IDS, MeanLogProb, settings
from tests.real_files import PROJECT
from tests.tiny_models import tiny_llama

GPU = torch.device("cuda")


class PretendedGpu(TorchFunctionMode):
    """Within it a tensor says that it is on a GPU, and is copied on the CPU where it would be sent there."""

    def __torch_function__(self, function: Callable, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == torch.Tensor.device.__get__:
            return GPU
        if function == torch.Tensor.to:
            assert args[1] == GPU
            return args[0].clone()
        # Memory is pinned by a GPU's driver.
        return function(*args, **{name: value for name, value in (kwargs or {}).items() if name != "pin_memory"})


class Hooks:
    """The module's own pack and unpack, on the pretended GPU; notes what was packed, as what, and what came back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.own_pack, self.own_unpack = activation_offload._pack, activation_offload._unpack
        self.packed: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.unpacked = 0
        monkeypatch.setattr(activation_offload, "_pack", self.pack)
        monkeypatch.setattr(activation_offload, "_unpack", self.unpack)

    def pack(self, tensor: torch.Tensor) -> Any:
        with PretendedGpu():
            device, kept = self.own_pack(tensor)
        assert device == GPU
        self.packed.append((tensor, kept))
        return device, kept

    def unpack(self, packed: Any) -> torch.Tensor:
        self.unpacked += 1
        with PretendedGpu():
            return self.own_unpack(packed)


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Hooks:
    return Hooks(monkeypatch)


def place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def new_engine(*, offload: bool) -> TorchEngine:
    values = load_yaml(PROJECT / "runtime.yaml")["default"] | {"activation_offload": offload}
    return TorchEngine(MeanLogProb(tiny_llama()), settings(), 1, Runtime(**values), ALONE)


def gradients(*, offload: bool) -> dict[str, torch.Tensor]:
    """Of two micro-batches."""
    engine = new_engine(offload=offload)
    for part in IDS.chunk(2):
        engine.backward(engine(part) / IDS.numel())
    return {name: weight.grad for name, weight in engine.trained.items()}


@pytest.mark.parametrize(
    "activation",
    [
        torch.randn(3, 4),
        torch.randn(3, 4).bfloat16(),
        torch.arange(5),
        torch.tensor([True, False]),
        torch.randn(3, 4).T,
        torch.randn(6, 4)[::2],
        torch.randn(1, 4).expand(3, 4),
        torch.tensor(2.0),
        torch.empty(0, 4),
    ],
    ids=["float32", "bfloat16", "integers", "booleans", "transposed", "strided", "expanded", "scalar", "empty"],
)
def test_an_activation_is_copied_and_comes_back_equal(hooks: Hooks, activation: torch.Tensor) -> None:
    device, kept = hooks.pack(activation)
    back = hooks.unpack((device, kept))
    places = {place(activation), place(kept), place(back)}
    assert len(places) == 3 or activation.numel() == 0
    assert back.dtype == activation.dtype
    assert torch.equal(back, activation)


def test_what_is_on_the_cpu_stays_as_it_is() -> None:
    activation = torch.randn(3, 4)
    device, kept = activation_offload._pack(activation)
    assert (device.type, kept is activation) == ("cpu", True)


@pytest.mark.parametrize(
    "view",
    [lambda weight: weight, torch.t, lambda weight: weight[1:], torch.flatten, lambda weight: weight.t()[1:]],
    ids=["itself", "transposed", "slice", "flat", "view of a view"],
)
def test_a_weight_is_not_copied(hooks: Hooks, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weight = view(nn.Parameter(torch.randn(3, 4)))
    assert hooks.pack(weight)[1] is weight


def test_the_gradients_are_those_without_offload(hooks: Hooks) -> None:
    without = gradients(offload=False)
    assert not hooks.packed
    with_offload = gradients(offload=True)
    assert hooks.unpacked
    assert with_offload.keys() == without.keys()
    assert all(torch.equal(gradient, without[name]) for name, gradient in with_offload.items())


def test_a_pass_copies_all_it_saves_but_its_weights(hooks: Hooks) -> None:
    engine = new_engine(offload=True)
    weights = {place(weight) for weight in engine.module.parameters()}
    engine(IDS)
    saved = {place(tensor) for tensor, _ in hooks.packed}
    assert saved & weights
    assert saved - weights
    for tensor, kept in hooks.packed:
        assert (place(kept) == place(tensor)) == (place(tensor) in weights)
