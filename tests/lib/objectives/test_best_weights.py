"""Last or best, and the best survives a resume."""

import math

import pytest
import torch

from stages.lib.objectives.best_weights import BestWeights, Patience
from stages.lib.settings.epochs import BestBy, EarlyStopping

BY_LOSS = BestBy(metric="loss", better="lower")


def offer_all(best: BestWeights, weights: dict[str, torch.Tensor], losses: list[float], first: int = 1) -> None:
    for step, loss in enumerate(losses, start=first):
        weights["w"].fill_(step)
        best.offer({"loss": loss, "accuracy": step / 10}, step, lambda: weights)


def test_the_lowest_loss_is_kept_as_it_was() -> None:
    weights = {"w": torch.zeros(2)}
    best = BestWeights("best", BY_LOSS, is_main=True)
    offer_all(best, weights, [3.0, 1.0, 2.0, 1.0])
    kept = best.choose(lambda: weights)
    assert kept.step == 2
    assert kept.results == {"loss": 1.0, "accuracy": 0.2}
    assert kept.weights["w"].tolist() == [2, 2]


def test_last_keeps_the_last() -> None:
    weights = {"w": torch.zeros(2)}
    best = BestWeights("last", BY_LOSS, is_main=True)
    offer_all(best, weights, [3.0, 1.0, 2.0])
    assert best.choose(lambda: weights) == (weights, 3, {"loss": 2.0, "accuracy": 0.3})


def test_a_resumed_run_remembers_the_best() -> None:
    weights = {"w": torch.zeros(2)}
    before, after = BestWeights("best", BY_LOSS, is_main=True), BestWeights("best", BY_LOSS, is_main=True)
    offer_all(before, weights, [3.0, 1.0])
    after.load_state_dict(before.state_dict(), dict(before.tensors()).__getitem__)
    offer_all(after, weights, [2.0], first=3)
    assert after.choose(lambda: weights).step == 2
    assert after.choose(lambda: weights).weights["w"].tolist() == [2, 2]


def test_tied_weights_are_saved_once_and_stay_tied() -> None:
    weight = torch.ones(2)
    before, after = BestWeights("best", BY_LOSS, is_main=True), BestWeights("best", BY_LOSS, is_main=True)
    before.offer({"loss": 1.0}, 1, lambda: {"embed": weight, "head": weight, "other": torch.zeros(2)})
    saved = dict(before.tensors())
    assert saved.keys() == {"embed", "other"}
    after.load_state_dict(before.state_dict(), saved.__getitem__)
    assert after.weights["embed"] is after.weights["head"]


def test_only_the_main_process_holds_the_copy() -> None:
    before, after = BestWeights("best", BY_LOSS, is_main=True), BestWeights("best", BY_LOSS, is_main=False)
    before.offer({"loss": 1.0}, 1, lambda: {"w": torch.ones(2)})
    after.load_state_dict(before.state_dict(), dict(before.tensors()).__getitem__)
    assert after.weights == {}
    assert after.step == 1


def test_the_best_may_be_the_highest_of_another_metric() -> None:
    weights = {"w": torch.zeros(2)}
    best = BestWeights("best", BestBy(metric="accuracy", better="higher"), is_main=True)
    for step, accuracy in enumerate([0.5, 0.75, 0.75, 0.25], start=1):
        best.offer({"loss": 1 / step, "accuracy": accuracy}, step, lambda: weights)
    assert best.step == 2


@pytest.mark.parametrize(
    ("min_delta", "costs", "stops_after"),
    [
        (0.0, [3.0, 2.0, 2.0, 1.9, 2.5, 1.9], 6),  # an equal one is no gain; a gain starts the count again
        (0.5, [3.0, 2.75, 2.5], 3),  # gains of 0.25, and of 0.5 and no more
        (0.5, [3.0, 2.75, 2.25, 2.25, 2.0], 5),  # 0.75 in two evaluations is a gain; another 0.25 is none
        (0.0, [-1.0, -2.0, -3.0, -4.0], None),
    ],
)
def test_patience_ends_after_two_evaluations_without_a_gain(
    min_delta: float, costs: list[float], stops_after: int | None
) -> None:
    patience = Patience(EarlyStopping(patience=2, min_delta=min_delta))
    over = []
    for cost in costs:
        assert not patience.is_over
        patience.offer(cost)
        over.append(patience.is_over)
        resumed = Patience(patience.settings)
        resumed.load_state_dict(patience.state_dict())
        patience = resumed
    assert [step for step, is_over in enumerate(over, start=1) if is_over] == ([stops_after] if stops_after else [])


def test_without_early_stopping_patience_never_ends() -> None:
    patience = Patience(None)
    for _ in range(100):
        patience.offer(1.0)
    assert not patience.is_over
    assert patience.lowest == math.inf
