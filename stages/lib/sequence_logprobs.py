"""Per-sequence log-probabilities ℓ(y|x) = Σ_t log π(y_t | x, y_<t) over completion tokens, the EOS included."""

from typing import Any, NamedTuple

import torch

from stages.lib.batching import SequenceBatch, pair_batches


class PairLogProbs(NamedTuple):
    """Sums over completion tokens, in nats. Shapes: (pairs,)."""

    chosen: torch.Tensor
    rejected: torch.Tensor


def pair_logps(module: Any, batch: SequenceBatch) -> PairLogProbs:
    """ℓ of the chosen and rejected completions of one `pair_batches` forward pass. Shapes: (b,), (b,)."""
    logps, _ = module(batch.input_ids, batch.attention_mask, batch.completion_mask)
    chosen, rejected = logps.sum(dim=-1).chunk(2)
    return PairLogProbs(chosen, rejected)


@torch.no_grad()
def all_pair_logps(
    module: Any, pairs: dict[str, list], token_budget: int, pad_id: int, device: torch.device
) -> PairLogProbs:
    """ℓ of every pair, in the order given, on the CPU in float32. `pairs`: columns of the preference token table."""
    count = len(pairs["prompt_ids"])
    result = PairLogProbs(torch.zeros(count), torch.zeros(count))
    columns = (pairs["prompt_ids"], pairs["chosen_ids"], pairs["rejected_ids"])
    for batch in pair_batches(*columns, token_budget, pad_id, device):
        for target, values in zip(result, pair_logps(module, batch), strict=True):
            target[batch.rows] = values.float().cpu()
    return result
