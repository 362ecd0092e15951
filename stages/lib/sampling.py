"""Sampling responses so that a response depends on weights, prompt and its own seed, never on the batch it is in."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from stages.lib.batching import pad_left
from stages.lib.errors import StageError
from stages.lib.token_logprobs import position_ids


def uniform_draws(seed: int, step: int, row: int, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) that belong to (seed, step, row). Shape: (count,), float64."""
    key, counter = [seed, (step << 32) + row], [0, 0, 0, 1]  # the counter sets it apart from the order of rows
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).random(count)


def require_room(prompts: Iterable[Sequence[int]], config: Any, max_new_tokens: int, where: str) -> None:
    """Raise StageError, beginning with `where`, if a prompt and its response may not fit into the model's positions."""
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(len(ids) for ids in prompts)
    if positions is not None and longest + max_new_tokens > positions:
        raise StageError(
            f"{where}: the longest prompt has {longest} tokens, and {max_new_tokens} new ones are more than the "
            f"model's {positions} positions; lower max_new_tokens or tokenize.max_prompt_length"
        )


@torch.no_grad()
def sample_responses(
    language_model: nn.Module,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    *,
    seed: int,
    step: int,
    temperature: float,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    batch_size: int,
    device: torch.device,
) -> list[list[int]]:
    """Sample one response to each prompt from softmax(logits / temperature), by inverting its cumulative distribution.

    Args:
        prompts: token ids of each prompt.
        rows: with `seed` and `step`, the identity of each response's random numbers.
        temperature: 0 takes the likeliest token.
    Returns:
        Token ids of each response, up to and including the first EOS, or `max_new_tokens` of them without one.
    """
    responses: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    for start in range(0, len(by_length), batch_size):
        group = by_length[start : start + batch_size]
        draws = np.stack([uniform_draws(seed, step, rows[index], max_new_tokens) for index in group])
        sampled = _sample_batch(
            language_model, [prompts[index] for index in group], draws, temperature, eos_id, pad_id, device
        )
        for index, tokens in zip(group, sampled.tolist(), strict=True):
            responses[index] = tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens
    return responses


def _sample_batch(
    language_model: nn.Module,
    prompts: list[Sequence[int]],
    draws: np.ndarray,
    temperature: float,
    eos_id: int,
    pad_id: int,
    device: torch.device,
) -> torch.Tensor:
    """Token by token with a key-value cache, until every row has ended. (b, new tokens); pads after EOS."""
    from transformers import DynamicCache

    ids, mask = pad_left(prompts, pad_id, device)
    positions = position_ids(mask)
    cache = DynamicCache(config=language_model.config)
    uniform = torch.from_numpy(draws).to(device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    tokens = []
    for step in range(draws.shape[1]):
        output = language_model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        token = torch.where(ended, pad_id, invert_distribution(output.logits[:, -1], uniform[:, step], temperature))
        tokens.append(token)
        ended = ended | (token == eos_id)
        if bool(ended.all()):
            break
        ids = token[:, None]
        mask = torch.cat([mask, torch.ones_like(ids, dtype=torch.bool)], dim=1)
        positions = positions[:, -1:] + 1
    return torch.stack(tokens, dim=1)


def invert_distribution(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
    """The token at which the cumulative distribution passes a uniform draw. (b, vocabulary), (b,) → (b,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = torch.softmax(logits.double() / temperature, dim=-1).cumsum(dim=-1)
    place = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, place, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
