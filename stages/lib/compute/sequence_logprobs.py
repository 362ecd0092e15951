"""Per-sequence log-probabilities ℓ(y|x) = Σ_t log π(y_t | x, y_<t) over completion tokens, the EOS included."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from stages.lib.compute.batching import MicroBatching, SequenceBatch


class PairLogProbs(NamedTuple):
    """Sums over completion tokens, in nats. Shapes: (pairs,)."""

    chosen: torch.Tensor
    rejected: torch.Tensor


class PairTokenLogProbs(NamedTuple):
    """The same, and log π(y_t | x, y_<t) of each completion token of each pair, in nats."""

    sums: PairLogProbs
    chosen: list[list[float]]
    rejected: list[list[float]]


def pair_token_logps(module: Any, batch: SequenceBatch) -> torch.Tensor:
    """log π(y_t | x, y_<t) of the chosen, then of the rejected completions of one forward pass over pairs.

    Returns:
        (2b, t), 0 beyond a completion's end.
    """
    logps, _ = module(*batch.inputs, batch.completion_mask)
    return batch.on_completions(logps)


def pair_logps(module: Any, batch: SequenceBatch) -> PairLogProbs:
    """ℓ of the chosen and rejected completions of one forward pass over pairs. Shapes: (b,), (b,)."""
    chosen, rejected = pair_token_logps(module, batch).sum(dim=-1).tensor_split(2)
    return PairLogProbs(chosen, rejected)


@torch.no_grad()
def all_pair_logps(module: Any, pairs: dict[str, list], batching: MicroBatching) -> PairLogProbs:
    """ℓ of every pair, in the order given, on the CPU in float64, in all processes.

    Args:
        pairs: columns of the preference token table, the same in all processes.
    """

    def passes() -> dict[int, tuple[float, float]]:
        found = {}
        for batch in batching.pairs(pairs["prompt_ids"], pairs["chosen_ids"], pairs["rejected_ids"]):
            logps = pair_logps(module, batch)
            found |= dict(zip(batch.rows, zip(*(part.tolist() for part in logps), strict=True), strict=True))
        return found

    everything = batching.processes.gather_rows(batching.budget.attempt(passes))
    return PairLogProbs(*torch.tensor(everything, dtype=torch.float64).reshape(-1, 2).unbind(dim=1))


@torch.no_grad()
def all_pair_token_logps(module: Any, pairs: dict[str, list], batching: MicroBatching) -> PairTokenLogProbs:
    """As `all_pair_logps`, whose sums it gives to the last bit, with the log-probs of the tokens beside them."""

    def passes() -> dict[int, tuple[float, float, list[float], list[float]]]:
        found = {}
        for batch in batching.pairs(pairs["prompt_ids"], pairs["chosen_ids"], pairs["rejected_ids"]):
            logps = pair_token_logps(module, batch)
            sums = [part.tolist() for part in logps.sum(dim=-1).tensor_split(2)]
            tokens = [row[:length] for row, length in zip(logps.tolist(), batch.completion_lengths, strict=True)]
            count = len(batch.rows)
            found |= dict(zip(batch.rows, zip(*sums, tokens[:count], tokens[count:], strict=True), strict=True))
        return found

    rows = batching.processes.gather_rows(batching.budget.attempt(passes))
    sums = torch.tensor([row[:2] for row in rows], dtype=torch.float32)
    return PairTokenLogProbs(
        PairLogProbs(*sums.reshape(-1, 2).unbind(dim=1)), [row[2] for row in rows], [row[3] for row in rows]
    )


@torch.no_grad()
def all_text_logps(
    module: Any, sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[int]], batching: MicroBatching
) -> list[float]:
    """Σ_t m_t log π(y_t | y_<t) of every text, in the order given, in all processes.

    Args:
        sequences, masks: token ids, and m_t; the same in all processes.
    """

    def passes() -> dict[int, float]:
        found = {}
        for batch in batching.masked(sequences, masks):
            logps, _ = module(*batch.inputs, batch.completion_mask)
            found |= dict(zip(batch.rows, batch.on_completions(logps).sum(dim=-1).tolist(), strict=True))
        return found

    return batching.processes.gather_rows(batching.budget.attempt(passes))


@torch.no_grad()
def all_response_logps(
    module: Any,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    batching: MicroBatching,
    temperature: float = 1.0,
) -> torch.Tensor:
    """ℓ of every response to its prompt, in the order given, on the CPU in float32, in all processes. Shape: (n,).

    Args:
        prompts, responses: token ids, the same in all processes.
        temperature: logits are divided by it.
    """

    def passes() -> dict[int, float]:
        found = {}
        for batch in batching.sequences(prompts, responses):
            logps = module(*batch.inputs, batch.completion_mask, temperature).logps
            found |= dict(zip(batch.rows, batch.on_completions(logps).sum(dim=-1).tolist(), strict=True))
        return found

    return torch.tensor(batching.processes.gather_rows(batching.budget.attempt(passes)), dtype=torch.float32)
