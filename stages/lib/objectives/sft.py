"""The objective of supervised fine-tuning: a loss of the completion tokens, in nats.

L = Σ_t m_t loss_t / Σ_t m_t
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from stages.lib.compute.batching import MicroBatching, SequenceBatch
from stages.lib.objectives.embedding_noise import EmbeddingNoise
from stages.lib.objectives.objective import Mean, PassSums, Rows, summed


def cross_entropy(logps: torch.Tensor) -> torch.Tensor:
    """−log π(y_t)"""
    return -logps


def dft(logps: torch.Tensor) -> torch.Tensor:
    """−sg(π(y_t)) log π(y_t)

    Dynamic fine-tuning (arXiv 2508.05629, Eq. 9); sg stops the gradient. The probability takes back the 1 / π(y_t) that
    the gradient of cross-entropy, read as a policy gradient, weights a token with.
    """
    return -logps.detach().exp() * logps


# Each takes log-probs of tokens, of any shape, and gives one loss a token; where a log-prob is 0, so is the loss.
SFT_LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"cross_entropy": cross_entropy, "dft": dft}


def perplexity(nats: float) -> float:
    """exp of the mean of −log π(y_t), bounded so that it stays a number that a report shows."""
    return math.exp(min(nats, 200.0))


METRICS = {
    "loss": Mean("tokens"),
    "perplexity": Mean("tokens", perplexity),
    "entropy": Mean("tokens"),  # of the distribution that each token is the target of
    "token_accuracy": Mean("tokens"),  # the share of targets that no other token is likelier than
}


@dataclass(frozen=True)
class SftObjective:
    """Rows of `SFT_SCHEMA`; the module gives `predictions` (`TokenLogProbs`); the step has Σ_t m_t tokens.

    Args:
        loss: a name in `SFT_LOSSES`.
        noise: on the embeddings while training; the module is then an engine, which counts the steps.
    """

    batching: MicroBatching
    loss: str = "cross_entropy"
    noise: EmbeddingNoise | None = None
    metrics = METRICS

    def batches(self, rows: Rows) -> Iterator[SequenceBatch]:
        return self.batching.masked(rows["input_ids"], rows["loss_mask"])

    def altered(self, module: Any, batch: SequenceBatch, rows: Rows) -> AbstractContextManager[None]:
        """Within it a pass over a batch reads embeddings with noise, if there is any."""
        return self.noise.added(batch, rows, module.steps_taken) if self.noise else nullcontext()

    def sums(self, module: Any, batch: SequenceBatch, rows: Rows) -> PassSums:
        with self.altered(module, batch, rows) if torch.is_grad_enabled() else nullcontext():
            logps, entropies, hits = module(*batch.inputs, batch.completion_mask, run="predictions")
        losses = SFT_LOSSES[self.loss](logps)
        return PassSums(losses.sum(), summed(losses, -logps, entropies, hits))

    def denominators(self, rows: Rows) -> Mapping[str, int]:
        return {"tokens": sum(map(sum, rows["loss_mask"]))}

    def units(self, rows: Rows) -> int:
        return sum(map(len, rows["input_ids"]))
