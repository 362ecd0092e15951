"""Last or best, and the best survives a resume."""

import torch

from stages.lib.objectives.best_weights import BestWeights


def offer_all(best: BestWeights, weights: dict[str, torch.Tensor], losses: list[float], first: int = 1) -> None:
    for step, loss in enumerate(losses, start=first):
        weights["w"].fill_(step)
        best.offer({"loss": loss, "accuracy": step / 10}, step, lambda: weights)


def test_the_lowest_loss_is_kept_as_it_was() -> None:
    weights = {"w": torch.zeros(2)}
    best = BestWeights("best", is_main=True)
    offer_all(best, weights, [3.0, 1.0, 2.0, 1.0])
    kept = best.choose(lambda: weights)
    assert kept.step == 2
    assert kept.results == {"loss": 1.0, "accuracy": 0.2}
    assert kept.weights["w"].tolist() == [2, 2]


def test_last_keeps_the_last() -> None:
    weights = {"w": torch.zeros(2)}
    best = BestWeights("last", is_main=True)
    offer_all(best, weights, [3.0, 1.0, 2.0])
    assert best.choose(lambda: weights) == (weights, 3, {"loss": 2.0, "accuracy": 0.3})


def test_a_resumed_run_remembers_the_best() -> None:
    weights = {"w": torch.zeros(2)}
    before, after = BestWeights("best", is_main=True), BestWeights("best", is_main=True)
    offer_all(before, weights, [3.0, 1.0])
    after.load_state_dict(before.state_dict(), dict(before.tensors()).__getitem__)
    offer_all(after, weights, [2.0], first=3)
    assert after.choose(lambda: weights).step == 2
    assert after.choose(lambda: weights).weights["w"].tolist() == [2, 2]


def test_tied_weights_are_saved_once_and_stay_tied() -> None:
    weight = torch.ones(2)
    before, after = BestWeights("best", is_main=True), BestWeights("best", is_main=True)
    before.offer({"loss": 1.0}, 1, lambda: {"embed": weight, "head": weight, "other": torch.zeros(2)})
    saved = dict(before.tensors())
    assert saved.keys() == {"embed", "other"}
    after.load_state_dict(before.state_dict(), saved.__getitem__)
    assert after.weights["embed"] is after.weights["head"]


def test_only_the_main_process_holds_the_copy() -> None:
    before, after = BestWeights("best", is_main=True), BestWeights("best", is_main=False)
    before.offer({"loss": 1.0}, 1, lambda: {"w": torch.ones(2)})
    after.load_state_dict(before.state_dict(), dict(before.tensors()).__getitem__)
    assert after.weights == {}
    assert after.step == 1
