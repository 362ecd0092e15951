"""Updates that end where the policy gets too far: which of them stand, and that taking one back leaves no trace."""

from typing import Any

import pytest
import torch

from stages.lib.compute.engine.torch import TorchEngine
from stages.lib.compute.processes import Processes
from stages.lib.models.scalar_scores import TokenScores
from stages.lib.rl.step_back import KlLimit, LimitedUpdates, StateBefore
from tests.lib.rl.test_learner import OPTIMIZER, PLAIN_TORCH, engine
from tests.tiny_models import CPU, tiny_classifier


def state_of(own: TorchEngine) -> dict[str, Any]:
    return own.state_dict() | {name: tensor.clone() for name, tensor in own.tensors()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) if isinstance(one[name], torch.Tensor) else one[name] == other[name]
        for name in one
    )


def take_step(own: TorchEngine, seed: int) -> None:
    torch.manual_seed(seed)
    ids = torch.randint(3, 20, (1, 6))
    own.backward(own(ids, None, torch.arange(6)[None]).square().sum())
    own.step()


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_training_goes_on_as_if_the_step_had_not_been(steps: int, ema_decay: float | None) -> None:
    settings = OPTIMIZER.model_copy(update={"ema_decay": ema_decay})
    engines = [
        TorchEngine(TokenScores(tiny_classifier()), settings, 8, PLAIN_TORCH, Processes(0, 1, CPU)) for _ in range(2)
    ]
    for own in engines:
        for seed in range(steps):
            take_step(own, seed)
    before = StateBefore(engines[0])
    take_step(engines[0], 99)
    assert not same(state_of(engines[0]), state_of(engines[1]))
    before.restore()
    assert same(state_of(engines[0]), state_of(engines[1]))
    for own in engines:
        take_step(own, 7)
    assert same(state_of(engines[0]), state_of(engines[1]))


class Steps:
    """A learner that is further away after each update, by a distance that is written down."""

    name = "policy"

    def __init__(self, distances: list[float]) -> None:
        self.engine = engine()
        self.distances = [0.0, *distances]
        self.measured: list[list[int]] = []

    def measure(self, rows: list[int]) -> dict[str, float]:
        self.measured.append(rows)
        return {"policy/approxkl": self.distances[self.engine.steps_taken]}

    def update(self, rows: list[int]) -> dict[str, float]:
        take_step(self.engine, rows[0])
        return {"policy/loss": float(rows[0])}


@pytest.mark.parametrize(
    ("distances", "stand"),
    [([1, 2, 3], [0, 1, 2]), ([1, 9, 3], [0]), ([9, 1, 1], []), ([1, 2, 9], [0, 1])],
)
def test_the_last_weights_within_the_limit_stay(distances: list[float], stand: list[int]) -> None:
    steps = Steps(distances)
    limited = LimitedUpdates(steps, limit=3.5)
    for rows in ([0], [1], [2]):
        limited.update(rows)
    limited.check([0])
    assert [found["policy/loss"] for found in limited.found] == stand
    alone = engine()
    for seed in stand:
        take_step(alone, seed)
    assert same(state_of(steps.engine), state_of(alone))


def test_without_a_limit_nothing_is_measured() -> None:
    steps = Steps([9, 9])
    limited = LimitedUpdates(steps, limit=None)
    limited.update([0])
    limited.update([1])
    limited.check([0])
    assert (len(limited.found), steps.measured) == (2, [])


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("resumed", [False, True])
def test_the_last_state_within_a_limit_comes_back(steps: int, resumed: bool) -> None:
    own, alone = engine(), engine()
    limit = KlLimit(3.0, own)
    for seed in range(steps):
        take_step(own, seed)
        take_step(alone, seed)
        limit.keep(seed)
    limit.keep(steps)
    take_step(own, 99)
    if resumed:  # by another process, from a checkpoint
        state, tensors = limit.state_dict(), {name: tensor.clone() for name, tensor in limit.tensors()}
        assert {"phases": steps, "kept": {"small": alone.state_dict(), "names": [*tensors]}} == state
        limit = KlLimit(3.0, own)
        limit.load_state_dict(state, tensors.__getitem__)
    assert [limit.is_passed(kl) for kl in (3.0, 3.1)] == [False, True]
    assert limit.step_back() == steps
    assert same(state_of(own), state_of(alone))


def test_without_a_limit_nothing_is_kept() -> None:
    limit = KlLimit(None, engine())
    limit.keep(1)
    assert (limit.is_passed(1e9), [*limit.tensors()], limit.state_dict()) == (False, [], {"phases": 0, "kept": None})
