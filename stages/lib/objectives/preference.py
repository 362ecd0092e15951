"""The objective of direct preference optimization: a loss on log-probs of pairs of replies, beside a reference's.

L = Σ_i loss_i / n
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from stages.lib.compute.batching import MicroBatching, SequenceBatch, tokens_in_pairs
from stages.lib.compute.sequence_logprobs import pair_logps
from stages.lib.objectives.objective import PassSums, Rows, means_over, summed
from stages.lib.objectives.preference_losses import PREFERENCE_LOSSES, PairBatch, implicit_rewards
from stages.lib.settings.preference_loss import PreferenceLoss

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
METRICS = means_over("pairs", "loss", *REWARDS, "logps/chosen", "logps/rejected")


class PreferenceObjective:
    """Rows of `PREFERENCE_SCHEMA` and `REFERENCE_SCHEMA`; the module gives log-probs (`TokenLogProbs`); n counts pairs.

    The rewards among the metrics are the implicit ones, β log π/π_ref, whatever the loss.
    """

    metrics = METRICS

    def __init__(self, batching: MicroBatching, loss: PreferenceLoss) -> None:
        self.batching = batching
        self.loss = loss

    def batches(self, rows: Rows) -> Iterator[SequenceBatch]:
        return self.batching.pairs(rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"])

    def sums(self, module: Any, batch: SequenceBatch, rows: Rows) -> PassSums:
        logps = pair_logps(module, batch)
        pairs = pair_batch(logps.chosen, logps.rejected, batch.rows, rows)
        losses = PREFERENCE_LOSSES[self.loss.type](pairs, self.loss)
        chosen, rejected = implicit_rewards(pairs, self.loss.beta)
        margins = chosen - rejected
        accuracies = (margins > 0).double() + 0.5 * (margins == 0).double()
        return PassSums(losses.sum(), summed(losses, chosen, rejected, margins, accuracies, *logps))

    def denominators(self, rows: Rows) -> Mapping[str, int]:
        return {"pairs": len(rows["prompt_ids"])}

    def units(self, rows: Rows) -> int:
        return tokens_in_pairs(rows)


def pair_batch(chosen: torch.Tensor, rejected: torch.Tensor, places: list[int], rows: Rows) -> PairBatch:
    """What a loss needs of the pairs at these places of `rows`; `chosen` and `rejected` are the policy's log-probs."""

    def column(name: str) -> torch.Tensor:
        return torch.tensor([rows[name][place] for place in places], device=chosen.device)

    def lengths(name: str) -> torch.Tensor:
        return torch.tensor([len(rows[name][place]) for place in places], device=chosen.device)

    return PairBatch(
        chosen,
        rejected,
        column("reference_chosen_logps"),
        column("reference_rejected_logps"),
        lengths("chosen_ids"),
        lengths("rejected_ids"),
    )
