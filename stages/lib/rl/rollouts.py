"""Rollouts of PPO: prompts, sampled responses, and what policy, reference, critic and reward model say of them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from stages.lib.compute.batching import MicroBatching, SequenceBatch
from stages.lib.rl.kl_control import kl_estimate


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
    """What the models say of one response: a number per token, and its score."""

    logps: list[float]
    reference_logps: list[float]
    entropies: list[float]
    values: list[float]
    score: float


@torch.no_grad()
def score_responses(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    policy: Callable,
    reference: Callable,
    critic: Callable,
    reward_model: Callable,
    batching: MicroBatching,
) -> list[Scored]:
    """Forward passes of all four models over all responses, without gradient; the same list in all processes."""

    def passes() -> dict[int, Scored]:
        found = {}
        for batch in batching.sequences(prompts, responses):
            logps, entropies = policy(*batch.inputs, batch.completion_mask)
            reference_logps, _ = reference(*batch.inputs, batch.completion_mask)
            per_token = (logps, reference_logps, entropies, values_before(critic, batch))
            columns = [batch.on_completions(values).tolist() for values in per_token]
            scores = reward_model(*batch.inputs, batch.end_mask).tolist()
            for place, (row, length) in enumerate(zip(batch.rows, batch.completion_lengths, strict=True)):
                found[row] = Scored(*(column[place][:length] for column in columns), scores[place])
        return found

    return batching.processes.gather_rows(batching.budget.attempt(passes))


def values_before(critic: Callable, batch: SequenceBatch) -> torch.Tensor:
    """V of the state before each token: the critic read one position earlier. (b, t); the first column is 0."""
    scores = critic(*batch.inputs)
    return torch.cat([torch.zeros_like(scores[:, :1]), scores[:, :-1]], dim=1)


def assemble(
    prompts: list[list[int]],
    responses: list[list[int]],
    scored: list[Scored],
    *,
    kl_estimator: str,
    eos_id: int,
    device: torch.device,
) -> Rollouts:
    """Put lists over all responses of a phase into aligned tensors."""
    logps, reference_logps, entropies, values = (
        response_tensor([getattr(one, name) for one in scored], device) for name in Scored._fields[:4]
    )
    lengths = torch.tensor([len(response) for response in responses], device=device)
    mask = torch.arange(logps.shape[1], device=device) < lengths[:, None]
    kl = kl_estimate(logps, reference_logps, kl_estimator)
    return Rollouts(
        prompts=prompts,
        responses=responses,
        response_mask=mask,
        logps=logps,
        kl=torch.where(mask, kl, 0.0),
        entropies=entropies,
        values=values,
        scores=torch.tensor([one.score for one in scored], device=device),
        ended=torch.tensor([response[-1] == eos_id for response in responses], device=device),
    )


def response_tensor(rows: Sequence[Sequence[float]], device: torch.device) -> torch.Tensor:
    """Per-token lists of unequal length as a (b, t) tensor, 0 beyond each end."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], device=device)
