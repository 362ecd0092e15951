"""The objective of supervised fine-tuning: cross-entropy of the completion tokens, in nats.

L = − Σ_t m_t log π(y_t | x, y_<t) / Σ_t m_t
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stages.lib.compute.batching import MicroBatching, SequenceBatch
from stages.lib.objectives.objective import Mean, PassSums, Rows, summed

METRICS = {"loss": Mean("tokens")}


@dataclass(frozen=True)
class SftObjective:
    """Rows of `SFT_SCHEMA`; the module gives log-probs (`TokenLogProbs`); the step has Σ_t m_t tokens."""

    batching: MicroBatching
    metrics = METRICS

    def batches(self, rows: Rows) -> Iterator[SequenceBatch]:
        return self.batching.masked(rows["input_ids"], rows["loss_mask"])

    def sums(self, module: Any, batch: SequenceBatch, _rows: Rows) -> PassSums:
        logps, _ = module(*batch.inputs, batch.completion_mask)
        loss = -logps.sum()
        return PassSums(loss, summed(loss))

    def denominators(self, rows: Rows) -> Mapping[str, int]:
        return {"tokens": sum(map(sum, rows["loss_mask"]))}

    def units(self, rows: Rows) -> int:
        return sum(map(len, rows["input_ids"]))
