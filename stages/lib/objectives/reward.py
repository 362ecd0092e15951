"""The objectives of a reward model, each a mean over pairs or replies.

pairs      L = Σ_i l(r(x, y_c), r(x, y_r), m_i) / n,   l as in `pairwise_loss`
replies    L = Σ_i (r(x, y) − s_i)² / n
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stages.lib.compute.batching import MicroBatching, SequenceBatch, tokens_in_pairs
from stages.lib.objectives.objective import PassSums, Rows, means_over, summed
from stages.lib.objectives.pairwise_loss import pairwise_logistic_losses
from stages.lib.objectives.regression_loss import squared_errors
from stages.lib.settings.reward_loss import PairwiseLoss

OF_PAIRS = means_over(
    "pairs", "loss", "accuracy", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/squares"
)
OF_REPLIES = means_over(
    "replies", "loss", "rewards/mean", "rewards/squares", "scores/mean", "scores/squares", "scores/products"
)


@dataclass(frozen=True)
class RewardObjective:
    """Rows of `PREFERENCE_SCHEMA`; the module gives a score a sequence (`SequenceScores`); n counts the step's pairs.

    m is the column `margin` where the loss uses it; else 0.
    """

    batching: MicroBatching
    loss: PairwiseLoss
    metrics = OF_PAIRS

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


@dataclass(frozen=True)
class ScoreObjective:
    """Rows of `UNPAIRED_SCHEMA` with a score each; the module gives one a sequence; n counts the step's replies."""

    batching: MicroBatching
    metrics = OF_REPLIES

    def batches(self, rows: Rows) -> Iterator[SequenceBatch]:
        return self.batching.sequences(rows["prompt_ids"], rows["completion_ids"])

    def sums(self, module: Any, batch: SequenceBatch, rows: Rows) -> PassSums:
        rewards = module(*batch.inputs, batch.end_mask)
        scores = torch.tensor([rows["score"][row] for row in batch.rows], device=rewards.device)
        losses = squared_errors(rewards, scores)
        ours, theirs = rewards.double(), scores.double()
        return PassSums(losses.sum(), summed(losses, ours, ours.square(), theirs, theirs.square(), ours * theirs))

    def denominators(self, rows: Rows) -> Mapping[str, int]:
        return {"replies": len(rows["prompt_ids"])}

    def units(self, rows: Rows) -> int:
        return sum(len(ids) for name in ("prompt_ids", "completion_ids") for ids in rows[name])
