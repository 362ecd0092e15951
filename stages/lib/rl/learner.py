"""The updates of one engine on rollouts: minibatches, gradients from the processes' parts of them, optimizer steps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from stages.lib.compute.batching import MicroBatching, SequenceBatch
from stages.lib.compute.engine.base import Engine, require_finite
from stages.lib.rl.rollouts import Rollouts

TokenSums = Mapping[str, torch.Tensor]  # over response tokens, by name; "loss" is the one that carries gradient


class Pass(NamedTuple):
    """One forward pass of an engine over some of the rollouts."""

    engine: Engine
    batch: SequenceBatch
    rows: list[int]  # of the rollouts


class Passes(Protocol):
    """What `minibatches` reads of a section of params.yaml."""

    @property
    def epochs(self) -> int: ...

    @property
    def minibatch_size(self) -> int: ...


def minibatches(rollouts: int, settings: Passes, seed: int, phase: int) -> Iterator[list[int]]:
    """The rows of each minibatch of a phase (0-based), in an order of its own for each epoch: (seed, phase, epoch)."""
    for epoch in range(settings.epochs):
        key = [seed, (phase << 32) + epoch]
        order = np.random.Generator(np.random.Philox(key=key)).permutation(rollouts)
        for start in range(0, rollouts, settings.minibatch_size):
            yield [int(row) for row in order[start : start + settings.minibatch_size]]


class Learner:
    """Updates one engine on the rollouts of a phase, minibatch by minibatch, all processes together.

    Args:
        name: of the metrics: `<name>/loss` and so on.
        loss: what is summed over the tokens of a pass; a name with a slash is that of the metric itself.
        beside: adds what else the gradient of an update holds, and returns this process's parts of means, by name.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        batching: MicroBatching,
        rollouts: Rollouts,
        loss: Callable[[Rollouts, Pass], TokenSums],
        beside: Callable[[Engine], dict[str, torch.Tensor]] | None = None,
    ) -> None:
        self.name = name
        self.engine = engine
        self.batching = batching
        self.rollouts = rollouts
        self.loss = loss
        self.beside = beside

    @torch.no_grad()
    def measure(self, rows: list[int]) -> dict[str, float]:
        """Means of the loss's sums over all response tokens of a minibatch, without an update."""
        return self._means(rows)

    def update(self, rows: list[int]) -> dict[str, float]:
        """The same, with one optimizer step on the mean loss, and the norm of its gradient.

        Raises:
            StageError: the loss or the norm is not finite.
        """
        means = self._means(rows)
        require_finite(means[f"{self.name}/loss"], f"{self.name} loss", self.engine.steps_taken)
        return means | {f"{self.name}/grad_norm": self.engine.step()}

    def _means(self, rows: list[int]) -> dict[str, float]:
        rollouts = self.rollouts
        tokens = max(1, int(rollouts.response_mask[rows].sum()))  # a mask may leave all responses out
        prompts, responses = ([columns[row] for row in rows] for columns in (rollouts.prompts, rollouts.responses))

        def passes() -> dict[str, torch.Tensor]:
            totals: dict[str, torch.Tensor] = {}
            for batch in self.batching.sequences(prompts, responses):
                sums = self.loss(rollouts, Pass(self.engine, batch, [rows[row] for row in batch.rows]))
                if torch.is_grad_enabled():
                    self.engine.backward(sums["loss"] / tokens)
                for name, value in sums.items():
                    key = name if "/" in name else f"{self.name}/{name}"
                    totals[key] = totals.get(key, 0.0) + value.detach().double().cpu() / tokens
            return totals | (self.beside(self.engine) if self.beside and torch.is_grad_enabled() else {})

        totals = self.batching.budget.attempt(passes, self.engine)
        sums = self.batching.processes.sum([float(total) for total in totals.values()])
        return dict(zip(totals, sums, strict=True))


def means_of_updates(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each name over the updates of a phase; of a name that says so, the value in the first of them."""
    first = found[0] if found else {}
    return mean_of_each(found) | {name: value for name, value in first.items() if "/first_" in name}


def mean_of_each(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each name, the mean over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}
