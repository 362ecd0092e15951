"""The objective of direct preference optimization: a loss on log-probs of pairs of replies, beside a reference's.

L = Σ_k w_k Σ_i loss_k,i / n, over the losses k of a mixture, or over one
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from stages.lib.compute.batching import MicroBatching, SequenceBatch, tokens_in_pairs
from stages.lib.compute.sequence_logprobs import all_pair_logps
from stages.lib.models.token_logprobs import TokenDetails
from stages.lib.objectives.objective import Mean, PassSums, Rows, means_over, summed
from stages.lib.objectives.pair_views import halves, pair_batch, seen_by, ties_of, weights_by_wpo
from stages.lib.objectives.preference_losses import (
    PREFERENCE_LOSSES,
    PairBatch,
    StepTies,
    clamped_shares,
    implicit_rewards,
    mean_logps,
)
from stages.lib.objectives.running_mean import RunningMean
from stages.lib.objectives.step_ties import TIED, ties_of_step
from stages.lib.settings.preference_loss import (
    BcoPairLoss,
    MixtureLoss,
    OrpoLoss,
    PreferenceLoss,
    SimpoLoss,
    has_exponents,
    is_weighted,
    reads_reference,
    weighted_losses,
)

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
LOGPS = ("logps/chosen", "logps/rejected")
CLAMPED = "exponents/clamped"
WEIGHT = "wpo/weight"
OF_TOKENS = {
    "logits/chosen": Mean("chosen tokens"),
    "logits/rejected": Mean("rejected tokens"),
    "entropy": Mean("tokens"),
}


def metrics_of_loss(loss: PreferenceLoss) -> dict[str, Mean]:
    """What the curve shows of a loss: the metrics of all, under TRL's names, and those that it alone has."""
    losses = [part.loss for part in weighted_losses(loss).values()]
    names = ["loss", *REWARDS, *LOGPS]
    names += [f"loss/{name}" for name in weighted_losses(loss)] if isinstance(loss, MixtureLoss) else []
    names += [CLAMPED] if any(map(has_exponents, losses)) else []
    names += [WEIGHT] if any(map(is_weighted, losses)) else []
    return means_over("pairs", *names) | OF_TOKENS


class PreferenceObjective:
    """Rows of `PREFERENCE_SCHEMA`, with the columns of a reference where the loss reads one; n counts pairs.

    The module gives log-probs, and `details` of each token (`TokenLogProbs`). What the losses keep between steps is in
    the checkpoint.
    """

    def __init__(self, batching: MicroBatching, loss: PreferenceLoss) -> None:
        self.batching = batching
        self.loss = loss
        self.parts = weighted_losses(loss)
        self.metrics = metrics_of_loss(loss)
        self.shifts = {name: RunningMean() for name, part in self.parts.items() if isinstance(part.loss, BcoPairLoss)}
        self._tied: tuple[Rows | None, Mapping[str, StepTies]] = None, {}

    def batches(self, rows: Rows) -> Iterator[SequenceBatch]:
        return self.batching.pairs(rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"])

    def sums(self, module: Any, batch: SequenceBatch, rows: Rows) -> PassSums:
        ties = self.ties(module, rows)
        details = module(*batch.inputs, batch.completion_mask, run="details")
        tokens = TokenDetails(*map(batch.on_completions, details))
        chosen, rejected = halves(tokens.logps)
        pairs = pair_batch(chosen.sum(dim=-1), rejected.sum(dim=-1), batch.rows, rows)
        weights = weights_by_wpo(pairs, tokens) if WEIGHT in self.metrics else None
        losses, clamped = {}, []
        for name, (weight, loss) in ((name, (part.weight, part.loss)) for name, part in self.parts.items()):
            own = seen_by(loss, pairs, tokens, batch.rows, rows)
            own = own._replace(ties=ties_of(ties[name], batch.rows, chosen))
            of_part = PREFERENCE_LOSSES[loss.type](own, loss)
            losses[f"loss/{name}"] = of_part if weights is None or not is_weighted(loss) else weights * of_part
            losses["loss"] = losses.get("loss", 0.0) + weight * losses[f"loss/{name}"]
            clamped += [clamped_shares(own, loss)] if has_exponents(loss) else []
        found = losses | rewards(pairs, self.loss)
        found |= {"logps/chosen": pairs.policy_chosen_logps, "logps/rejected": pairs.policy_rejected_logps}
        found |= {CLAMPED: torch.stack(clamped).mean(dim=0)} if clamped else {}
        found |= {} if weights is None else {WEIGHT: weights}
        found |= zip(("logits/chosen", "logits/rejected"), halves(tokens.mean_logits), strict=True)
        found["entropy"] = tokens.entropies
        return PassSums(losses["loss"].sum(), summed(*(found[name] for name in self.metrics)))

    def ties(self, module: Any, rows: Rows) -> Mapping[str, StepTies]:
        """What ties the pairs of a step together, by part: worked out at the first pass over `rows`, and remembered.

        All processes call it together. Where gradients are recorded, what is kept between steps takes in the step.
        """
        if self._tied[0] is not rows:
            self._tied = rows, self._ties_of_rows(module, rows, train=torch.is_grad_enabled())
        return self._tied[1]

    def _ties_of_rows(self, module: Any, rows: Rows, *, train: bool) -> Mapping[str, StepTies]:
        count = len(rows["chosen_ids"])
        ties = StepTies(mean_chosen_length=sum(map(len, rows["chosen_ids"])) / count)
        if not any(isinstance(part.loss, TIED) for part in self.parts.values()):
            return dict.fromkeys(self.parts, ties)
        logps = all_pair_logps(module, dict(rows), self.batching)
        pairs = pair_batch(logps.chosen, logps.rejected, list(range(count)), rows)._replace(ties=ties)
        return {
            name: ties_of_step(pairs, part.loss, self.shifts.get(name), train=train)
            for name, part in self.parts.items()
        }

    def denominators(self, rows: Rows) -> Mapping[str, int]:
        chosen, rejected = (sum(map(len, rows[name])) for name in ("chosen_ids", "rejected_ids"))
        tokens = {"chosen tokens": chosen, "rejected tokens": rejected, "tokens": chosen + rejected}
        return {"pairs": len(rows["prompt_ids"]), **tokens}

    def units(self, rows: Rows) -> int:
        return tokens_in_pairs(rows)

    def state_dict(self) -> dict[str, Any]:
        return {name: shift.state_dict() for name, shift in self.shifts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, shift in self.shifts.items():
            shift.load_state_dict(state[name])


def first_values(loss: PreferenceLoss) -> dict[str, float]:
    """The loss that a policy which is its reference has on any pair, of each part of which no more need be known."""
    zero, one = torch.zeros(1), torch.ones(1)
    pair = PairBatch(zero, zero, zero, zero, one, one, StepTies(beside_chosen=zero, beside_rejected=zero))
    known = {
        name: part.loss
        for name, part in weighted_losses(loss).items()
        if reads_reference(part.loss) and not is_weighted(part.loss)
    }
    return {name: float(PREFERENCE_LOSSES[own.type](pair, own)) for name, own in known.items()}


def rewards(pairs: PairBatch, loss: PreferenceLoss) -> dict[str, torch.Tensor]:
    """`REWARDS` of each pair, (n,) each, without gradient: β log π/π_ref, whatever the loss; a tie is half right.

    β is that of the first part that has one. Without a reference they are β log π, and those of SimPO and ORPO, as
    their losses take them, of mean log-probs.
    """
    losses = [part.loss for part in weighted_losses(loss).values()]
    first = next((own for own in losses if hasattr(own, "beta")), losses[0])
    if isinstance(first, SimpoLoss | OrpoLoss):
        scale = first.beta if isinstance(first, SimpoLoss) else first.odds_weight
        chosen, rejected = (scale * logps.detach() for logps in mean_logps(pairs))
    else:
        chosen, rejected = (own.detach() for own in implicit_rewards(pairs, getattr(first, "beta", 1.0)))
    margins = chosen - rejected
    accuracies = (margins > 0).double() + 0.5 * (margins == 0).double()
    return dict(zip(REWARDS, (chosen, rejected, margins, accuracies), strict=True))
