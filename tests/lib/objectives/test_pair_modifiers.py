"""WPO and LD-DPO against NumPy, from whole distributions and token by token."""

import numpy as np
import pytest
import torch

from stages.lib.objectives.pair_modifiers import discounted_sums, wpo_weights

CHOSEN, REJECTED = (4, 2, 1), (3, 5, 1)  # lengths of the replies of three pairs


def masked(values: np.ndarray, lengths: tuple[int, ...]) -> torch.Tensor:
    """(n, t) with 0 beyond each length."""
    return torch.tensor(np.where(np.arange(values.shape[1]) < np.array(lengths)[:, None], values, 0.0))


def test_weights_are_those_of_whole_distributions() -> None:
    generator = np.random.default_rng(0)
    columns, wanted = [], np.zeros(3)
    for lengths in (CHOSEN, REJECTED):
        probs = generator.dirichlet(np.full(6, 0.4), size=(3, 5))
        drawn = np.take_along_axis(probs, generator.integers(6, size=(3, 5, 1)), axis=-1)[..., 0]
        factors = drawn / (probs**2).sum(axis=-1)
        wanted += [np.log(own[:length]).mean() for own, length in zip(factors, lengths, strict=True)]
        columns += [masked(np.log(drawn), lengths), masked(np.log((probs**2).sum(axis=-1)), lengths)]
    weights = wpo_weights(*columns, *map(torch.tensor, (CHOSEN, REJECTED)))
    assert weights.tolist() == pytest.approx(np.minimum(1, np.exp(wanted)).tolist())


def test_a_weight_is_at_most_1_and_has_no_gradient() -> None:
    # Probabilities .6, .3, .1: the likeliest token's factor is .6 / (.36 + .09 + .01) = 1.304; the third's 0.217.
    logps = torch.tensor([[0.6], [0.1]], dtype=torch.float64).log().requires_grad_()
    collisions = torch.tensor([[0.46], [0.46]], dtype=torch.float64).log()
    ones = torch.ones(2)
    weights = wpo_weights(logps, collisions, logps, collisions, ones, ones)
    assert weights.tolist() == pytest.approx([1.0, (0.1 / 0.46) ** 2])
    assert not weights.requires_grad


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_tokens_beyond_the_shorter_reply_are_discounted(alpha: float) -> None:
    generator = np.random.default_rng(1)
    logps = [-generator.exponential(size=(3, length)) for length in (4, 5)]
    sums = discounted_sums(
        masked(logps[0], CHOSEN), masked(logps[1], REJECTED), *map(torch.tensor, (CHOSEN, REJECTED)), alpha
    )
    for found, own, lengths in zip(sums, logps, (CHOSEN, REJECTED), strict=True):
        for pair, length in enumerate(lengths):
            shorter = min(CHOSEN[pair], REJECTED[pair])
            wanted = own[pair, :shorter].sum() + alpha * own[pair, shorter:length].sum()
            assert found[pair].item() == pytest.approx(wanted)
