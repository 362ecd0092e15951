"""Updates of a policy that end where it gets too far from the one that sampled; the last step is then taken back."""

from collections.abc import Sequence

import torch

from stages.lib.compute.averaging_adamw import AVERAGE
from stages.lib.compute.engine.base import Engine
from stages.lib.rl.learner import Learner


class StateBefore:
    """The weights and optimizer states that an engine has now, copied to the CPU, so that it can return to them.

    All processes call its methods together.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.small = engine.state_dict()
        self.tensors = {name: tensor.to("cpu", copy=True) for name, tensor in engine.tensors()}

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
