"""A frozen base in 4 bits: NormalFloat 4 with doubly quantised block constants (QLoRA, arXiv 2305.14314, Section 3).

bitsandbytes holds each linear layer's weight as 4-bit indices into the 16 NF4 values, times one constant for every 64
weights; a forward pass dequantises a layer at a time into the compute dtype. Embeddings, norms and heads stay whole.
"""

from typing import Any

import torch
from torch import nn

from stages.lib.errors import StageError


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


def is_quantized(model: nn.Module) -> bool:
    return getattr(model, "hf_quantizer", None) is not None


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model whose weight is held in 4 bits, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(getattr(module, "weight", None), "quant_state") and "weight" in module._parameters
    }


def dequantized(layer: nn.Module) -> torch.Tensor:
    """The weight that a 4-bit layer computes with, exactly, as float32 on the CPU. Shape: (out, in)."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().cpu()


def whole_twin(model: nn.Module) -> nn.Module:
    """The class and configuration of a quantised model, without quantisation and without weights: to save with."""
    from copy import deepcopy

    config = deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        twin = type(model)(config)
    if model.can_generate():
        twin.generation_config = model.generation_config
    return twin
