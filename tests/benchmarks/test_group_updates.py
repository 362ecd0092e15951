"""Updates with a group's prompt computed once, on a few rollouts: as many steps, fewer rows, the same weights."""

import copy

import torch

from benchmarks.group_updates import Phase, random_episodes, row_of, updated
from benchmarks.sampling import random_model


def test_both_ways_end_with_the_same_weights() -> None:
    model, phase = random_model(), Phase(4, 60, 6, 8, 8)
    episodes = random_episodes(phase)
    assert [episode.sample for episode in episodes] == [0, 1, 2, 3] * 2
    apart, once = (updated(copy.deepcopy(model), episodes, phase, share=share) for share in (False, True))
    assert (apart.rows, once.rows) == (16, 4)  # two epochs of eight rollouts, in two groups
    moved = apart.weights - torch.cat([weight.detach().flatten() for weight in model.parameters()])
    assert (once.weights - apart.weights).norm() < 1e-3 * moved.norm()
    assert row_of(phase, apart, once).split(" | ")[:4] == ["| 4", "8", "60", "3"]
