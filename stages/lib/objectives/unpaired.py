"""The objective on single replies that are good or bad: a loss on their log-probs beside a reference's.

L = Σ_i loss_i / n
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from stages.lib.compute.batching import MicroBatching, SequenceBatch
from stages.lib.compute.sequence_logprobs import all_response_logps
from stages.lib.models.token_logprobs import TokenDetails
from stages.lib.objectives.objective import Mean, PassSums, Rows, summed
from stages.lib.objectives.running_mean import RunningMean
from stages.lib.objectives.unpaired_losses import UNPAIRED_LOSSES, ReplyBatch
from stages.lib.settings.unpaired_loss import BcoLoss, KtoLoss, UnpairedLoss

SHIFTS = {"kto": "kl", "bco": "delta"}  # names of the metric that shows what rewards are measured from


def metrics_of_replies(loss: UnpairedLoss) -> dict[str, Mean]:
    """What the curve shows, under TRL's names: means over good replies (chosen) and over bad ones (rejected)."""
    means = {
        "loss": Mean("replies"),
        "rewards/chosen": Mean("good"),
        "rewards/rejected": Mean("bad"),
        "rewards/margins": Mean("both"),
        "logps/chosen": Mean("good"),
        "logps/rejected": Mean("bad"),
        "logits/chosen": Mean("good tokens"),
        "logits/rejected": Mean("bad tokens"),
        "entropy": Mean("tokens"),
    }
    return means | ({SHIFTS[loss.type]: Mean("replies")} if loss.type in SHIFTS else {})


class UnpairedObjective:
    """Rows of `UNPAIRED_SCHEMA` and `UNPAIRED_REFERENCE_SCHEMA`; n counts replies.

    The module gives log-probs, and `details` of each token (`TokenLogProbs`). The rewards among the metrics are the
    implicit ones, β log π/π_ref; their margin is the mean of those of good replies less that of bad ones. What a loss
    keeps between steps is part of a checkpoint.
    """

    def __init__(self, batching: MicroBatching, loss: UnpairedLoss) -> None:
        self.batching = batching
        self.loss = loss
        self.metrics = metrics_of_replies(loss)
        self.mean_reward = RunningMean()
        self._shift: tuple[Rows | None, bool, float] = None, False, 0.0

    def batches(self, rows: Rows) -> Iterator[SequenceBatch]:
        return self.batching.sequences(rows["prompt_ids"], rows["completion_ids"])

    def sums(self, module: Any, batch: SequenceBatch, rows: Rows) -> PassSums:
        shift = self.shift(module, rows)
        details = module(*batch.inputs, batch.completion_mask, run="details")
        tokens = TokenDetails(*map(batch.on_completions, details))
        policy = tokens.logps.sum(dim=-1)
        replies = reply_batch(policy, batch.rows, rows)._replace(shift=shift)
        losses = UNPAIRED_LOSSES[self.loss.type](replies, self.loss)
        rewards, good = self.loss.beta * replies.log_ratios.detach().double(), replies.labels
        counts = self.denominators(rows)
        shares = good.double() / max(counts["good"], 1) - (~good).double() / max(counts["bad"], 1)
        found = {
            "loss": losses,
            "rewards/chosen": rewards * good,
            "rewards/rejected": rewards * ~good,
            "rewards/margins": rewards * shares,
            "logps/chosen": policy * good,
            "logps/rejected": policy * ~good,
            "logits/chosen": tokens.mean_logits[good],
            "logits/rejected": tokens.mean_logits[~good],
            "entropy": tokens.entropies,
        }
        found |= {name: torch.full_like(rewards, shift) for name in SHIFTS.values()}
        return PassSums(losses.sum(), summed(*(found[name] for name in self.metrics)))

    def shift(self, module: Any, rows: Rows) -> float:
        """What rewards are measured from in the step of `rows`: worked out at its first pass, and remembered.

        All processes call it together, and get the same. Where gradients are recorded, a running mean takes in the
        step.
        """
        train = torch.is_grad_enabled()
        if self._shift[0] is not rows or self._shift[1] != train:
            self._shift = rows, train, self._shift_of(module, rows, train=train)
        return self._shift[2]

    def _shift_of(self, module: Any, rows: Rows, *, train: bool) -> float:
        if isinstance(self.loss, KtoLoss):
            return kl_of_step(module, rows, self.batching)
        if isinstance(self.loss, BcoLoss):
            if train:
                logps = all_response_logps(module, rows["prompt_ids"], rows["completion_ids"], self.batching)
                self.mean_reward.add(self.loss.beta * (logps.double() - reference(rows["reference_logps"])))
            return self.mean_reward.mean
        return 0.0

    def denominators(self, rows: Rows) -> Mapping[str, int]:
        replies, good = len(rows["label"]), sum(rows["label"])
        lengths = [*map(len, rows["completion_ids"])]
        good_tokens = sum(length for length, label in zip(lengths, rows["label"], strict=True) if label)
        return {
            "replies": replies,
            "good": good,
            "bad": replies - good,
            "both": int(0 < good < replies),
            "tokens": sum(lengths),
            "good tokens": good_tokens,
            "bad tokens": sum(lengths) - good_tokens,
        }

    def units(self, rows: Rows) -> int:
        columns = ("prompt_ids", "completion_ids")
        return sum(len(ids) for name in columns for ids in rows[name])

    def state_dict(self) -> dict[str, Any]:
        return self.mean_reward.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean_reward.load_state_dict(state)


def kl_of_step(module: Any, rows: Rows, batching: MicroBatching) -> float:
    """z0 = max(0, mean of Δ over the mismatched replies of all rows), in nats; 0 where no row has one."""
    places = [place for place, ids in enumerate(rows["mismatched_ids"]) if ids is not None]
    if not places:
        return 0.0
    prompts, replies, logps_of_reference = (
        [rows[name][place] for place in places]
        for name in ("prompt_ids", "mismatched_ids", "reference_mismatched_logps")
    )
    logps = all_response_logps(module, prompts, replies, batching)
    return max(0.0, float((logps.double() - reference(logps_of_reference)).mean()))


def reference(logps: list[float]) -> torch.Tensor:
    return torch.tensor(logps, dtype=torch.float64)


def reply_batch(policy: torch.Tensor, places: list[int], rows: Rows) -> ReplyBatch:
    """What a loss needs of the replies at these places of `rows`; `policy` are their log-probs."""
    logps, labels = (
        torch.tensor([rows[name][place] for place in places], device=policy.device)
        for name in ("reference_logps", "label")
    )
    return ReplyBatch(policy, logps, labels.bool())
