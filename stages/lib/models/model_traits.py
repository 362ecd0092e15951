"""What of an architecture must be known, or changed, before a model of it is trained."""

import sys
from inspect import signature
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CAN_BE_PACKED = "can_be_packed"  # key of config.json; prepare_base writes it where the answer is no


def switch_off_dropout(model: nn.Module) -> None:
    """Set every probability of dropout, and noise of routers, to 0: a pass then depends on weights and ids alone.

    Architectures keep them under names of their own, such as `dropout`, `attn_dropout` and `router_jitter_noise`.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            is_number = isinstance(value, float | int) and not isinstance(value, bool)
            if is_number and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


NO_LIMIT = 2**31
# Layer by layer, what a model that reads masks attends to; a window counts in places of a row, not in positions.
WITHOUT_WINDOW, WITH_WINDOW = "full_attention", "sliding_attention"


def longest_shared(model: "PreTrainedModel") -> int:
    """How many tokens a prompt and the longer of two replies may have to lie in one row (`compute/row_layouts.py`).

    The model must take a mask for each pair of tokens, and be as `longest_whole_attention` says.
    """
    return longest_whole_attention(model) if model.config._attn_implementation in ("sdpa", "eager") else 0


def longest_whole_attention(model: "PreTrainedModel") -> int:
    """How many tokens a sequence may have in which every token sees all before it, and its place by its position.

    The model must be a decoder of transformers that counts positions by `position_ids`: no state space, no linear
    attention, no distances between places (ALiBi). A window of attention does no harm while the sequence is within it.
    Returns 0 where it cannot be, or is not known to be.
    """
    config: Any = model.config.get_text_config()
    body = model.base_model
    source = type(body).__module__
    if not source.startswith("transformers.models.") or not hasattr(sys.modules[source], "create_causal_mask"):
        return 0
    if "position_ids" not in signature(type(body).forward).parameters or getattr(config, "alibi", False):
        return 0
    if {getattr(module, "is_causal", True) for module in body.modules()} != {True}:  # of an encoder
        return 0
    layers = {*(getattr(config, "layer_types", None) or [])}
    window = getattr(config, "sliding_window", None)
    if not layers and window and getattr(config, "use_sliding_window", True):
        layers = {WITH_WINDOW}
    if not layers <= {WITHOUT_WINDOW, WITH_WINDOW}:
        return 0
    return (window or 0) if WITH_WINDOW in layers else NO_LIMIT
