"""A frozen base in 4 bits: NormalFloat 4 with doubly quantised block constants (QLoRA, arXiv 2305.14314, Section 3).

bitsandbytes holds each linear layer's weight as 4-bit indices into the 16 NF4 values, times one constant for every 64
weights; a forward pass dequantises a layer at a time into the compute dtype. Embeddings, norms and heads stay whole.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stages.lib.command.errors import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 64  # weights that share a constant


def nf4_options(compute_dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Options of `from_pretrained` that load a model in NF4. Raises StageError where bitsandbytes does not run."""
    require_nf4(device)
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=["lm_head", "embed_out", "score"],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def require_nf4(device: torch.device) -> None:
    """Quantise and multiply a small matrix. Raises StageError if bitsandbytes is missing or fails on `device`."""
    where = f"params.yaml: base_quantization: nf4 cannot be used on {device.type}"
    try:
        import bitsandbytes

        weight, state = bitsandbytes.functional.quantize_4bit(torch.eye(64, device=device), quant_type="nf4")
        bitsandbytes.matmul_4bit(torch.ones(2, 64, device=device), weight.t(), state)
    except ImportError as error:
        raise StageError(f"{where}: bitsandbytes cannot be imported ({error}); install it, or set null") from None
    except Exception as error:  # a missing native library or kernel shows itself in many types
        raise StageError(f"{where}: bitsandbytes fails there ({' '.join(str(error).split())}); set null") from None


def settle_quantized_layers(model: "PreTrainedModel") -> None:
    """Make a model's 4-bit layers trustworthy, or raise a StageError that says why they are not.

    bitsandbytes 0.50 repacks a layer's weight for some CPUs at its first evaluation, after which no gradient passes
    through it: that is switched off. And on CPUs with AVX-512 it takes the wrong block's constant where rows are no
    multiple of 64 weights long (of 16 they are): such a base would be far from the one that was asked for.
    """
    layers = quantized_layers(model).values()
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    for width, dtype in sorted(
        {(layer.weight.quant_state.shape[1], layer.weight.quant_state.dtype) for layer in layers}, key=str
    ):
        if not keeps_block_maxima(width, dtype, model.device):
            raise StageError(
                f"params.yaml: base_quantization: nf4 gives wrong weights on {model.device.type} where rows are "
                f"{width} long, as in this model, by a fault of bitsandbytes; set null, or use a GPU"
            )


def keeps_block_maxima(width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether rows of `width` weights come back from NF4 with the largest magnitude of each block of 64 as it was."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn((BLOCK, width), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    back = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4"))
    maxima = (values.reshape(-1, BLOCK).abs().amax(dim=1).float() for values in (weight, back))
    return torch.allclose(*maxima, rtol=1e-2)


def is_quantized(model: nn.Module) -> bool:
    return getattr(model, "hf_quantizer", None) is not None


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of a model whose weight is held in 4 bits, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(getattr(module, "weight", None), "quant_state") and "weight" in module._parameters
    }


def dequantized(layer: Any) -> torch.Tensor:
    """The weight that a 4-bit layer computes with, exactly, as float32 on the CPU. Shape: (out, in)."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().cpu()


def whole_twin(model: "PreTrainedModel") -> "PreTrainedModel":
    """The class and configuration of a quantised model, without quantisation and without weights: to save with."""
    from copy import deepcopy

    config = deepcopy(model.config)
    del config.quantization_config  # pyrefly: ignore[missing-attribute] (one of a quantised model)
    with torch.device("meta"):
        twin = type(model)(config)
    if model.can_generate():
        twin.generation_config = model.generation_config
    return twin
