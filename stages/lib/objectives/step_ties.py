"""What ties the pairs of an optimizer step together in some losses, worked out from all of them, without gradient.

A first pass over the step gives the log-probs of all its pairs, so that what a pair is compared with does not depend on
the micro-batch or the process it is in.
"""

import torch

from stages.lib.objectives.preference_losses import PairBatch, StepTies, implicit_rewards
from stages.lib.objectives.running_mean import RunningMean
from stages.lib.settings.preference_loss import AotLoss, AotUnpairedLoss, BcoPairLoss, PairLoss

TIED = (AotLoss, AotUnpairedLoss, BcoPairLoss)  # the losses that need the first pass


def ties_of_step(pairs: PairBatch, loss: PairLoss, shift: RunningMean | None, *, train: bool) -> StepTies:
    """The ties of all pairs of a step, in their order; `pairs` has those that every loss has.

    Args:
        shift: of bco_pair; with `train` the step's rewards are added to it first.
    """
    ties = pairs.ties
    if isinstance(loss, BcoPairLoss) and shift is not None:
        if train:
            shift.add(torch.cat(implicit_rewards(pairs, loss.beta)))
        return ties._replace(shift=shift.mean)
    if isinstance(loss, AotLoss):
        return ties._replace(beside_chosen=at_its_place(pairs.policy_gaps, pairs.reference_gaps))
    if isinstance(loss, AotUnpairedLoss):
        chosen, rejected = pairs.chosen_log_ratios, pairs.rejected_log_ratios
        return ties._replace(
            beside_chosen=at_its_place(chosen, rejected), beside_rejected=at_its_place(rejected, chosen)
        )
    return ties


def at_its_place(values: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """For each value the one of `others` that has its place among them when both are sorted. Shapes: (n,)."""
    places = values.argsort(stable=True)
    return torch.empty_like(others).scatter(0, places, others.sort(stable=True).values)
