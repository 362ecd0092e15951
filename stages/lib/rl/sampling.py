"""Drawing tokens from a distribution by random numbers that belong to one response, whatever batch it is in."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from stages.lib.command.errors import StageError
from stages.lib.models.model_facts import longest_sequence
from stages.lib.models.token_logprobs import at_least_float32


def uniform_draws(seed: int, step: int, row: int, count: int, sample: int = 0) -> np.ndarray:
    """`count` uniform numbers in [0, 1) that belong to (seed, step, row, sample). Shape: (count,), float64.

    Philox draws four numbers for each value of its counter, whose first word is counted up. The third one tells samples
    apart, and the fourth one all of them from the order of rows.
    """
    # Of a list in which a number takes the 64th bit NumPy makes floats, in which all rows are one.
    key, counter = np.array([seed, (step << 32) + row], dtype=np.uint64), [0, 0, sample, 1]
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).random(count)


def require_room(prompts: Iterable[Sequence[int]], config: Any, max_new_tokens: int, where: str) -> None:
    """Raise StageError, beginning with `where`, if a prompt and its response may not fit into the model's positions."""
    positions = longest_sequence(config.to_dict())
    longest = max(len(ids) for ids in prompts)
    if positions is not None and longest + max_new_tokens > positions:
        raise StageError(
            f"{where}: the longest prompt has {longest} tokens, and {max_new_tokens} new ones are more than the "
            f"model's {positions} positions; lower max_new_tokens or tokenize_data.max_prompt_length"
        )


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions counted over real tokens, so padding on the left does not shift them. (b, t) → (b, t)."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def invert_distribution(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> torch.Tensor:
    """The token at which the cumulative distribution passes a uniform draw. (b, vocabulary), (b,) → (b,).

    Args:
        temperature: logits are divided by it; 0: the likeliest token.
        top_k, top_p: as `likeliest` takes them.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    scaled = at_least_float32(logits) / temperature
    weights = torch.exp(scaled - scaled.amax(dim=-1, keepdim=True))
    if top_k is not None or top_p < 1:
        weights = likeliest(weights, top_k, top_p)
    cumulative = running_sums(weights)
    place = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, place, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def likeliest(weights: torch.Tensor, top_k: int | None, top_p: float) -> torch.Tensor:
    """Weights of tokens, (b, vocabulary), with 0 for those that are not among the likeliest.

    Args:
        top_k: how many count; of tokens that are equally likely the one with the lower id (None: all).
        top_p: of these the fewest whose share of the weights is at least this (nucleus sampling, arXiv 1904.09751).
    """
    ordered, tokens = weights.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered, tokens = ordered[:, :top_k], tokens[:, :top_k]
    if top_p < 1:
        sums = running_sums(ordered)
        ordered = torch.where(sums - ordered < top_p * sums[:, -1:], ordered, 0.0)
    return torch.zeros_like(weights).scatter_(1, tokens, ordered)


def statistics_of(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs of tokens, and entropies of the distributions they are of, in nats. (b, vocabulary), (b,) → (2, b)."""
    log_probs = torch.log_softmax(at_least_float32(logits) / temperature, dim=-1)
    logps = log_probs.gather(-1, tokens[:, None]).squeeze(-1)
    return torch.stack([logps, -torch.linalg.vecdot(log_probs.exp(), log_probs)])


def running_sums(rows: torch.Tensor) -> torch.Tensor:
    """Cumulative sums along each row in float64, the same bytes at every call. Shapes: (b, n) → (b, n).

    torch calls every floating-point `cumsum` on a GPU nondeterministic and refuses it. That is true of a single row,
    which many blocks sum together; of several rows each is summed by one block, in a fixed order
    (ATen/native/cuda/ScanUtils.cuh; github.com/pytorch/pytorch/issues/75240).
    """
    if rows.device.type == "cpu":
        return rows.cumsum(dim=-1, dtype=torch.float64)
    several = torch.cat([rows, rows]) if rows.shape[0] == 1 else rows
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        return several.cumsum(dim=-1, dtype=torch.float64)[: rows.shape[0]]
    finally:
        torch.set_deterministic_debug_mode(mode)
