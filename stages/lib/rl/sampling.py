"""Sampling responses so that a response depends on weights, prompt and its own seed, never on the batch it is in."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from stages.lib.command.errors import StageError
from stages.lib.compute.batching import pad_left
from stages.lib.compute.processes import Processes
from stages.lib.models.model_facts import longest_sequence


def uniform_draws(seed: int, step: int, row: int, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) that belong to (seed, step, row). Shape: (count,), float64."""
    key, counter = [seed, (step << 32) + row], [0, 0, 0, 1]  # the counter sets it apart from the order of rows
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


@torch.no_grad()
def sample_responses(
    policy: Callable,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    *,
    config: Any,
    seed: int,
    step: int,
    temperature: float,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    batch_size: int,
    processes: Processes,
    after_batch: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Sample one response to each prompt from softmax(logits / temperature), by inverting its cumulative distribution.

    The processes share the prompts out and take each forward pass together, as ZeRO 3 demands: a process whose prompts
    are all answered goes along on padding.

    Args:
        policy: a `TokenLogProbs` module or an engine around one.
        prompts: token ids of each prompt, the same in all processes.
        rows: with `seed` and `step`, the identity of each response's random numbers.
        config: the language model's configuration.
        temperature: 0 takes the likeliest token.
        batch_size: sequences that one process samples at a time.
        after_batch: called by all processes together whenever each has sampled so many.
    Returns:
        Token ids of each response, up to and including the first EOS, or `max_new_tokens` of them without one.
    """
    from transformers import DynamicCache

    by_length = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    responses: dict[int, list[int]] = {}
    width = batch_size * processes.world_size
    for start in range(0, len(by_length), width):
        together = by_length[start : start + width]
        group = processes.share(together)
        draws = [uniform_draws(seed, step, rows[index], max_new_tokens) for index in group]
        sampled = _sample_batch(
            policy,
            [prompts[index] for index in group or together[:1]],
            np.stack(draws or [np.zeros(max_new_tokens)]),
            temperature,
            DynamicCache(config=config),
            eos_id,
            pad_id,
            processes,
            asleep=not group,
        )
        for index, tokens in zip(group, sampled.tolist(), strict=False):
            responses[index] = tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens
        after_batch()
    return processes.gather_rows(responses)


def _sample_batch(
    policy: Callable,
    prompts: list[Sequence[int]],
    draws: np.ndarray,
    temperature: float,
    cache: Any,
    eos_id: int,
    pad_id: int,
    processes: Processes,
    *,
    asleep: bool,
) -> torch.Tensor:
    """Token by token with a key-value cache, until every row of every process has ended.

    Args:
        asleep: this process has no prompts of its own, and only goes along.
    Returns:
        (b, new tokens); pads after EOS.
    """
    ids, mask = pad_left(prompts, pad_id, processes.device)
    positions = positions_of(mask)
    uniform = torch.from_numpy(draws).to(processes.device)
    ended = torch.full((len(prompts),), asleep, dtype=torch.bool, device=processes.device)
    tokens = []
    for step in range(draws.shape[1]):
        logits = policy(ids, mask, positions, None, cache)
        token = torch.where(ended, pad_id, invert_distribution(logits, uniform[:, step], temperature))
        tokens.append(token)
        ended = ended | (token == eos_id)
        if not processes.any(not bool(ended.all())):
            break
        ids = token[:, None]
        mask = torch.cat([mask, torch.ones_like(ids, dtype=torch.bool)], dim=1)
        positions = positions[:, -1:] + 1
    return torch.stack(tokens, dim=1)


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions counted over real tokens, so padding on the left does not shift them. (b, t) → (b, t)."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def invert_distribution(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
    """The token at which the cumulative distribution passes a uniform draw. (b, vocabulary), (b,) → (b,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = running_sums(torch.softmax(logits.double() / temperature, dim=-1))
    place = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, place, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def running_sums(rows: torch.Tensor) -> torch.Tensor:
    """Cumulative sums along each row, the same bytes at every call. Shapes: (b, n) → (b, n).

    torch calls every floating-point `cumsum` on a GPU nondeterministic and refuses it. That is true of a single row,
    which many blocks sum together; of several rows each is summed by one block, in a fixed order
    (ATen/native/cuda/ScanUtils.cuh; github.com/pytorch/pytorch/issues/75240).
    """
    if rows.device.type == "cpu":
        return rows.cumsum(dim=-1)
    several = torch.cat([rows, rows]) if rows.shape[0] == 1 else rows
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        return several.cumsum(dim=-1)[: rows.shape[0]]
    finally:
        torch.set_deterministic_debug_mode(mode)
