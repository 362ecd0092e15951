"""What is trained on a fixed table: its batches, its sums, and what the sums are divided by."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from stages.lib.compute.batching import MicroBatching, SequenceBatch

Rows = Mapping[str, list[Any]]  # columns of some rows of a table, all of the same length


class Mean(NamedTuple):
    """A metric: its sum over all rows of a step, divided by the step's number of what it is a mean `over`."""

    over: str  # a name in the objective's `denominators`
    shown_as: Callable[[float], float] = float  # what becomes of the mean, such as exp for a perplexity


def means_over(over: str, *names: str) -> dict[str, Mean]:
    """Metrics that share a denominator."""
    return dict.fromkeys(names, Mean(over))


class PassSums(NamedTuple):
    """What the rows of one forward pass add to the sums of a step."""

    loss: torch.Tensor  # (), with gradient
    metrics: torch.Tensor  # (metrics,), float64 on the CPU, in the order of the objective's `metrics`


class Objective(Protocol):
    """A loss over the rows of an optimizer step, all micro-batches and processes together:

        L = Σ loss / denominator

    The denominators come from all rows of the step, never from those of one pass: in a mean of means, what a row counts
    for would depend on the others in its pass. Whatever else ties rows together is likewise worked out from all `rows`.
    """

    @property
    def metrics(self) -> Mapping[str, Mean]:
        """What `sums` adds up, by name: "loss", which is trained on, among them."""

    @property
    def batching(self) -> MicroBatching:
        """Cuts the rows; it knows the processes, and how much fits into memory."""

    def batches(self, rows: Rows) -> Iterator[SequenceBatch]:
        """This process's forward passes over rows."""

    def sums(self, module: Any, batch: SequenceBatch, rows: Rows, /) -> PassSums:
        """Run one of these passes. `batch.rows` are its places in `rows`, the whole step."""

    def denominators(self, rows: Rows) -> Mapping[str, int]:
        """By name, how many pairs, tokens, … these rows have: whatever its means are over."""

    def units(self, rows: Rows) -> int:
        """The tokens that a model reads of these rows, by which a step's speed is told."""


@runtime_checkable
class KeepsState(Protocol):
    """An objective that keeps something from step to step, such as a running mean, which is a part of a checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class AltersInputs(Protocol):
    """An objective whose passes read something else while training, such as embeddings with noise."""

    def altered(self, module: Any, batch: SequenceBatch, rows: Rows, /) -> AbstractContextManager[None]:
        """Within it a pass over a batch reads what its pass with a gradient does."""
        ...


def summed(*values: torch.Tensor) -> torch.Tensor:
    """The sum of each tensor, in float64 on the CPU, without gradient. Shape: (values,)."""
    return torch.stack([value.detach().double().sum().cpu() for value in values])
