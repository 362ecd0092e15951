"""Rollouts of PPO: prompts, sampled responses, and what policy, reference, critic and reward model say of them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from stages.lib.batching import SequenceBatch, sequence_batches
from stages.lib.kl_control import kl_estimate
from stages.lib.runtime import Runtime


class Rollouts(NamedTuple):
    """b responses of one rollout phase; per-token tensors are aligned to response tokens and 0 beyond their end."""

    prompts: list[list[int]]
    responses: list[list[int]]  # EOS included where there is one
    response_mask: torch.Tensor  # (b, t), True on response tokens
    logps: torch.Tensor  # (b, t), under the policy that sampled, at the sampling temperature
    kl: torch.Tensor  # (b, t), estimate of the KL to the reference, in nats
    entropies: torch.Tensor  # (b, t)
    values: torch.Tensor  # (b, t), of the critic before each token
    scores: torch.Tensor  # (b,), raw, of the reward model at the end of the response
    ended: torch.Tensor  # (b,), True where the response ends with EOS


class Scored(NamedTuple):
    """What the models say of some rollouts: lists over responses, of per-token lists or numbers."""

    logps: list[list[float]]
    reference_logps: list[list[float]]
    entropies: list[list[float]]
    values: list[list[float]]
    scores: list[float]


@torch.no_grad()
def score_responses(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    policy: Callable,
    reference: nn.Module,
    critic: Callable,
    reward_model: nn.Module,
    runtime: Runtime,
    pad_id: int,
    device: torch.device,
) -> Scored:
    """Forward passes of all four models over this process's responses, without gradient, in the order given."""
    empty: list[list[float]] = [[] for _ in prompts]
    result = Scored(*(list(empty) for _ in range(4)), [0.0] * len(prompts))
    for batch in sequence_batches(prompts, responses, runtime.micro_batch_tokens, pad_id, device):
        logps, entropies = policy(batch.input_ids, batch.attention_mask, batch.completion_mask)
        reference_logps, _ = reference(batch.input_ids, batch.attention_mask, batch.completion_mask)
        values = values_before(critic, batch)
        scores = reward_model(batch.input_ids, batch.attention_mask)
        for place, row in enumerate(batch.rows):
            kept = batch.completion_mask[place]
            result.logps[row] = logps[place][kept].tolist()
            result.entropies[row] = entropies[place][kept].tolist()
            result.reference_logps[row] = reference_logps[place][kept].tolist()
            result.values[row] = values[place][kept].tolist()
            result.scores[row] = float(scores[place])
    return result


def values_before(critic: Callable, batch: SequenceBatch) -> torch.Tensor:
    """V of the state before each token: the critic read one position earlier. (b, t); the first column is 0."""
    scores = critic(batch.input_ids, batch.attention_mask)
    return torch.cat([torch.zeros_like(scores[:, :1]), scores[:, :-1]], dim=1)


def assemble(
    prompts: list[list[int]],
    responses: list[list[int]],
    scored: Scored,
    *,
    kl_estimator: str,
    eos_id: int,
    device: torch.device,
) -> Rollouts:
    """Put lists over all responses of a phase into aligned tensors."""
    logps = response_tensor(scored.logps, device)
    lengths = torch.tensor([len(response) for response in responses], device=device)
    mask = torch.arange(logps.shape[1], device=device) < lengths[:, None]
    kl = kl_estimate(logps, response_tensor(scored.reference_logps, device), kl_estimator)
    return Rollouts(
        prompts=prompts,
        responses=responses,
        response_mask=mask,
        logps=logps,
        kl=torch.where(mask, kl, 0.0),
        entropies=response_tensor(scored.entropies, device),
        values=response_tensor(scored.values, device),
        scores=torch.tensor(scored.scores, dtype=torch.float32, device=device),
        ended=torch.tensor([response[-1] == eos_id for response in responses], device=device),
    )


def response_tensor(rows: Sequence[Sequence[float]], device: torch.device) -> torch.Tensor:
    """Per-token lists of unequal length as a (b, t) float32 tensor, 0 beyond each end."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float32, device=device)


def on_response(values: torch.Tensor, completion_mask: torch.Tensor, width: int) -> torch.Tensor:
    """Move per-token values of right-padded sequences (b, s) to response coordinates (b, width), 0 beyond the end."""
    lengths = completion_mask.sum(dim=-1)
    response_mask = torch.arange(width, device=values.device) < lengths[:, None]
    empty = torch.zeros(response_mask.shape, dtype=values.dtype, device=values.device)
    return empty.masked_scatter(response_mask, values[completion_mask])
