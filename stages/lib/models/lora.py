"""Low-rank adapters (LoRA, arXiv 2106.09685): W x becomes W x + s B A x, with W frozen and A, B trained.

A (r, in) starts uniform in ± 1/√in and B (out, r) at 0, so training starts at the base model exactly. s = α/r (Section
4.1), or α/√r with rank stabilisation (rsLoRA, arXiv 2312.03732). Each expert of a mixture has an A and a B of its own.
PEFT's layers are put into the transformers model, which keeps its class, so all that reads its parts goes on working.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from stages.lib.models.adapter_targets import adapter_targets
from stages.lib.models.pretrained import DTYPES
from stages.lib.models.quantization import dequantized, quantized_layers
from stages.lib.settings.lora import LoraSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"  # the name that PEFT gives to the only adapter of a model
ADAPTER_FOLDER = "adapter"


class Lora:
    """The adapters of one model; with `settings` None there are none, and every method leaves things as they are.

    Args:
        model: a transformers model, changed in place: its target layers get adapters, all else is frozen, except the
            scalar head of a classifier (`score`), which is trained whole.
        seed: of A, together with the layer's name: the same on every process, whatever else has an adapter.
        source: the folder of the base model, named in messages and in the saved adapter.
    Raises:
        StageError: a target is no linear layer of the model's body, or it has no experts or routers to be adapted.
    """

    def __init__(self, model: "PreTrainedModel", settings: LoraSettings | None, seed: int, source: Path) -> None:
        self.model = model
        self.settings = settings
        self.source = source
        self.layers: dict[str, Any] = {}
        if settings is None:
            return
        from peft import inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        self.targets = adapter_targets(model, settings, source)
        if self.targets.left_out and not (dist.is_initialized() and dist.get_rank()):
            print(f"note: params.yaml: lora: in {source} {self.targets.left_out}", file=sys.stderr)
        inject_adapter_in_model(self._config(settings), model, ADAPTER)
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        for name, layer in self.layers.items():
            start_adapter(layer, seed, adapted_weight(name, layer).removesuffix(".weight"), model.dtype)
        if hasattr(model, "score"):
            model.get_submodule("score").requires_grad_(True)
        self.trained_names = {name for name, weight in model.named_parameters() if weight.requires_grad}
        sizes = {name: weight.numel() for name, weight in model.named_parameters()}
        sizes |= {
            f"{name}.weight": layer.weight.quant_state.shape.numel() for name, layer in quantized_layers(model).items()
        }
        self.trained_parameters = sum(sizes[name] for name in self.trained_names)
        self.total_parameters = sum(sizes.values())

    def _config(self, settings: LoraSettings, **changed: Any) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=0.0,
            target_modules=self.targets.modules,
            target_parameters=self.targets.parameters or None,
            use_rslora=settings.rslora,
            fan_in_fan_out=has_transposed_layers(self.model),
            **changed,
        )

    def trained(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of a state dict of the model, what training changes."""
        if self.settings is None:
            return weights
        return {name: weight for name, weight in weights.items() if name in self.trained_names}

    def merged(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state dict of the model without adapters that computes the same: W + s B A, in float32 on the CPU.

        A 4-bit W is what the forward pass dequantised it to: the weight that the adapter was trained on.

        Args:
            weights: state dict of the model with adapters, adapters and head in float32.
        """
        if self.settings is None:
            return weights
        quantized = quantized_layers(self.model)
        adapters = tuple(f"{name}.lora_" for name in self.layers)
        codes = tuple(f"{name}.weight" for name in quantized)
        plain = {name: weight for name, weight in weights.items() if not name.startswith((*adapters, *codes))}
        plain |= {f"{name}.weight": dequantized(layer) for name, layer in quantized.items()}
        plain = {without_base_layer(name): weight for name, weight in plain.items()}
        for name, layer in self.layers.items():
            adapted = adapted_weight(name, layer)
            weight = plain[adapted]
            change = self._change(name, layer, weights).to(weight.device)
            plain[adapted] = (weight.float() + change).cpu()
        return plain

    def _change(self, name: str, layer: Any, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """s B A in the layout of the weight. Of E experts, A holds (E, r, in) in (E r, in), B (out, r, E)."""
        a, b = (weights[f"{name}.lora_{part}.{ADAPTER}.weight"].float() for part in "AB")
        experts = getattr(layer, "num_experts", 1)
        if experts == 1:
            change = b @ a
            transposed = layer.fan_in_fan_out
        else:
            change = torch.einsum("ore,eri->eoi", b.view(len(b), -1, experts), a.view(experts, -1, a.shape[1]))
            transposed = getattr(layer.get_base_layer(), "is_transposed", False)
        return layer.scaling[ADAPTER] * (change.mT if transposed else change)

    def counts(self) -> dict[str, int]:
        """Metrics: how many parameters are trained, and how many there are with them."""
        if self.settings is None:
            return {}
        return {"trained_parameters": self.trained_parameters, "total_parameters": self.total_parameters}

    def save_adapter(self, weights: dict[str, torch.Tensor], folder: Path, save_dtype: str) -> None:
        """Write the adapter, and a classifier's head, to `folder`/adapter in PEFT's format, if settings ask for it.

        `PeftModel.from_pretrained(base, folder / "adapter")` puts it on the base model.
        """
        if self.settings is not None and self.settings.save_adapter:
            self.write_adapter(weights, folder / ADAPTER_FOLDER, save_dtype)

    def write_adapter(self, weights: dict[str, torch.Tensor], target: Path, save_dtype: str) -> None:
        """Write the adapter, and a classifier's head, to a folder in PEFT's format."""
        from safetensors.torch import save_file

        assert self.settings is not None, "without settings nothing is adapted"
        target.mkdir(parents=True)
        tensors = {
            f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": weight.detach().to("cpu", DTYPES[save_dtype])
            for name, weight in self.trained(weights).items()
        }
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        head = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if hasattr(self.model, "score") else {}
        source = self.source.as_posix()
        config = self._config(self.settings, **{"task_type": "CAUSAL_LM"} | head, base_model_name_or_path=source)
        config.inference_mode = True
        values = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
        del values["peft_version"]  # no out holds a library's version
        text = json.dumps(values, indent=2, sort_keys=True)
        (target / "adapter_config.json").write_text(text + "\n", encoding="utf-8")

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it the model is its frozen base, but for a head that is trained whole. For use without gradient."""
        for layer in self.layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)


def has_transposed_layers(model: nn.Module) -> bool:
    """Whether the linear layers are GPT-2's, whose weight is (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def start_adapter(layer: Any, seed: int, name: str, dtype: torch.dtype) -> None:
    """Draw A from U(−1/√in, 1/√in), as PEFT does, but from the seed and the layer's name; B is 0."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    a, b = layer.lora_A[ADAPTER].to(dtype), layer.lora_B[ADAPTER].to(dtype)
    limit = a.weight.shape[1] ** -0.5
    with torch.no_grad():
        a.weight.copy_(torch.empty(a.weight.shape).uniform_(-limit, limit, generator=generator))
        b.weight.zero_()


def without_base_layer(name: str) -> str:
    """The name that a weight had before its layer got an adapter, or one for each of its parameters."""
    return name.replace("base_layer.", "")


def adapted_weight(name: str, layer: Any) -> str:
    """The name that the weight had which a layer of PEFT adapts; several around one another share their base layer."""
    return without_base_layer(f"{name}.{getattr(layer, 'parameter_name', 'weight')}")
