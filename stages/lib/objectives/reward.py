"""The objective of a reward model: the pairwise logistic loss of its scores of chosen and rejected replies.

L = Σ_i l(r(x, y_c), r(x, y_r), m_i) / n,   l as in `pairwise_loss`
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stages.lib.compute.batching import MicroBatching, SequenceBatch, tokens_in_pairs
from stages.lib.objectives.objective import PassSums, Rows, means_over, summed
from stages.lib.objectives.pairwise_loss import pairwise_logistic_losses
from stages.lib.settings.reward_loss import PairwiseLoss

METRICS = means_over(
    "pairs", "loss", "accuracy", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/squares"
)


@dataclass(frozen=True)
class RewardObjective:
    """Rows of `PREFERENCE_SCHEMA`; the module gives a score a sequence (`SequenceScores`); n counts the step's pairs.

    m is the column `margin` where the loss uses it; else 0.
    """

    batching: MicroBatching
    loss: PairwiseLoss
    metrics = METRICS

    def batches(self, rows: Rows) -> Iterator[SequenceBatch]:
        return self.batching.pairs(rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"])

    def sums(self, module: Any, batch: SequenceBatch, rows: Rows) -> PassSums:
        chosen, rejected = module(*batch.inputs, batch.end_mask).tensor_split(2)
        margins = [rows["margin"][row] if self.loss.use_margin else 0.0 for row in batch.rows]
        losses = pairwise_logistic_losses(
            chosen,
            rejected,
            torch.tensor(margins, device=chosen.device),
            label_smoothing=self.loss.label_smoothing,
            centering_coefficient=self.loss.centering_coefficient,
        )
        correct = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
        squares = (chosen.double().square() + rejected.double().square()) / 2
        return PassSums(losses.sum(), summed(losses, correct, chosen, rejected, chosen - rejected, squares))

    def denominators(self, rows: Rows) -> Mapping[str, int]:
        return {"pairs": len(rows["prompt_ids"])}

    def units(self, rows: Rows) -> int:
        return tokens_in_pairs(rows)
