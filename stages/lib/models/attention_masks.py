"""Which tokens see each other in a forward pass, as transformers' models take it."""

import torch

PARTS = 2**20  # at most, of a prompt and what lies behind it in a row; padding is part 0
PROMPT = 1


def model_mask(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """What a model is given as its attention mask.

    Args:
        mask: (b, t). Of booleans: True on real tokens, and a real token sees all before it. Of integers: the part of a
            row that a token belongs to, padding on the right; a token sees those before it in its own part and in the
            prompt that this stands behind. None: there is no padding.
        dtype: that the model computes in.
    Returns:
        (b, t) integers, or (b, 1, t, t), 0 where a token (row) sees another (column), else the lowest number.
    """
    if mask is None or mask.dtype == torch.bool:
        return None if mask is None else mask.long()
    own, other = mask[:, :, None], mask[:, None, :]
    sees = (own == other) | ((other % PARTS == PROMPT) & (own // PARTS == other // PARTS))
    lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=mask.device)
    return torch.where(sees.tril(), torch.zeros_like(lowest), lowest)[:, None]
