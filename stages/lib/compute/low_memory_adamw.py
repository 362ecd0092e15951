"""AdamW with moments that take less memory, by bitsandbytes: in 8 bits, or paged out where a GPU's memory is full.

In 8 bits, each block of 256 numbers is held as indices into 256 values, times one constant (arXiv 2110.02861). The
moments of embeddings, whose gradients are uneven, and of tensors of fewer than 4,096 numbers stay in float32 (section
2.3 there).
"""

import logging
from typing import Any

import torch

from stages.lib.command.errors import StageError

# What a checkpoint holds of a weight's states: the moments and, where they have 8 bits, the constants of their blocks.
# The 256 values are the same for all.
STATES = ("state1", "state2", "absmax1", "absmax2")
WHOLE = "whole"  # key of a group of weights whose moments stay in float32


def new_low_memory_adamw(groups: list[dict[str, Any]], moments: str, device: torch.device, **options: Any) -> Any:
    """An optimizer of bitsandbytes.

    Args:
        moments: how they are held, as an optimizer's settings say: "8bit", "paged" or "paged_8bit".
        groups: of weights, as torch's optimizers take them, each with the key `WHOLE`.
        options: those that torch's AdamW has, too.
    Raises:
        StageError: bitsandbytes is missing, or its kernels fail on this device.
    """
    where = f"params.yaml: optimizer.moments: {moments} cannot be used on {device.type}"
    if moments.startswith("paged") and device.type != "cuda":
        raise StageError(f"{where}, which pages memory by itself; set float32")
    try:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        weight = torch.nn.Parameter(torch.ones(64, 64, device=device))
        weight.grad = torch.ones_like(weight)
        _optimizer([{"params": [weight], WHOLE: False}], moments, lr=0.5).step()
        moved = weight.detach().cpu()
    except ImportError as error:
        raise StageError(f"{where}: bitsandbytes cannot be imported ({error}); install it, or set float32") from None
    except Exception as error:  # a missing native library or kernel shows itself in many types
        raise StageError(f"{where}: bitsandbytes fails there ({' '.join(str(error).split())}); set float32") from None
    if not torch.allclose(moved, torch.full_like(moved, 0.5), atol=0.05):
        raise StageError(f"{where}: bitsandbytes takes a wrong step there; set float32")
    return _optimizer(groups, moments, **options)


def _optimizer(groups: list[dict[str, Any]], moments: str, **options: Any) -> Any:
    from bitsandbytes.optim import AdamW, AdamW8bit

    chosen = AdamW8bit if moments.endswith("8bit") else AdamW
    optimizer = chosen(groups, weight_decay=0.0, is_paged=moments.startswith("paged"), **options)
    config_of = optimizer.get_config

    def get_config(gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        return config_of(gindex, pindex, group) | ({"optim_bits": 32} if group[WHOLE] else {})

    optimizer.get_config = get_config  # its own overrides are global, by the id of a weight
    return optimizer


def states_made(optimizer: Any, weight: torch.Tensor, steps: int) -> dict[str, Any]:
    """The optimizer's states of one of its weights, made if there are none yet, at a count of steps taken."""
    if not optimizer.state[weight]:
        places = (
            (group, number, place)
            for number, group in enumerate(optimizer.param_groups)
            for place, own in enumerate(group["params"])
            if own is weight
        )
        group, number, place = next(places)
        optimizer.init_state(group, weight, number, place)
    optimizer.state[weight]["step"] = steps
    return optimizer.state[weight]
