"""A policy that goes too far, from the one that sampled or from the reference, and back to where it was before."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from stages.lib.compute.averaging_adamw import AVERAGE
from stages.lib.compute.engine.base import Engine
from stages.lib.rl.learner import Learner


class StateBefore:
    """The weights and optimizer states that an engine has now, copied to the CPU, so that it can return to them.

    All processes call its methods together.

    Args:
        small, tensors: what an earlier one held; without them the state is that of now.
    """

    def __init__(
        self, engine: Engine, small: dict[str, Any] | None = None, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self.engine = engine
        self.small = engine.state_dict() if small is None else small
        found = engine.tensors() if tensors is None else tensors.items()
        self.tensors = {name: tensor.to("cpu", copy=True) for name, tensor in found}

    def restore(self) -> None:
        """Let the engine be as it was; only the plan for its learning rate stays."""
        engine = self.engine
        engine.load_state_dict(self.small, self.tensors.__getitem__)
        if self.small["steps_taken"] == 0:
            # Before the first step there were no states to copy; there are now.
            for name in engine.trained:
                weight = self.tensors[name]
                for key in engine.kept_states:
                    engine.set_full_state(name, weight if key == AVERAGE else torch.zeros_like(weight), key)


class LimitedUpdates:
    """The updates of a policy in one phase, in which it stays near the policy that sampled.

    How far it has gone is measured by approxkl, k3 of KL(old || current) per token, after each update, on the minibatch
    that comes next. Beyond the limit the update is taken back, and there are no more.

    Args:
        limit: in nats per token; None: every minibatch gives an update, and nothing is measured.
    """

    def __init__(self, learner: Learner, limit: float | None) -> None:
        self.learner = learner
        self.limit = limit
        self.found: list[dict[str, float]] = []  # of the updates that stand
        self.before: StateBefore | None = None  # the last of them
        self.over = False

    def update(self, rows: list[int]) -> None:
        """Update on a minibatch, unless that is over."""
        self.check(rows)
        if self.over:
            return
        if self.limit is not None:
            self.before = StateBefore(self.learner.engine)
        self.found.append(self.learner.update(rows))

    def check(self, rows: Sequence[int]) -> None:
        """Take the last update back if it has led too far, by what these rows say."""
        if self.before is None or self.over or self.limit is None:
            return
        if self.learner.measure([*rows])["policy/approxkl"] > self.limit:
            self.before.restore()
            self.found.pop()
            self.over = True


class KlLimit:
    """The last state of a policy whose rollouts were within a limit of their KL to the reference; part of a checkpoint.

    Args:
        limit: in nats per response; None: nothing is kept.
    """

    def __init__(self, limit: float | None, engine: Engine) -> None:
        self.limit = limit
        self.engine = engine
        self.within: StateBefore | None = None
        self.phases = 0  # whose updates that state has

    def is_passed(self, kl: float) -> bool:
        """Whether a KL, in nats per response, is above the limit."""
        return self.limit is not None and kl > self.limit

    def keep(self, phases: int) -> None:
        """Copy the state as it is, after the updates of this many phases."""
        if self.limit is not None:
            self.within, self.phases = StateBefore(self.engine), phases

    def step_back(self) -> int:
        """Return to the state that was kept, if any was. Returns the phases whose updates stand."""
        if self.within is not None:
            self.within.restore()
            self.within = None
        return self.phases

    def state_dict(self) -> dict[str, Any]:
        kept = None if self.within is None else {"small": self.within.small, "names": [*self.within.tensors]}
        return {"phases": self.phases, "kept": kept}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Those of the state that was kept."""
        yield from self.within.tensors.items() if self.within is not None else ()

    def load_state_dict(self, state: dict[str, Any], read: Callable[[str], torch.Tensor]) -> None:
        self.phases, kept = state["phases"], state["kept"]
        tensors = {name: read(name) for name in kept["names"]} if kept else None
        self.within = StateBefore(self.engine, kept["small"], tensors) if kept else None
