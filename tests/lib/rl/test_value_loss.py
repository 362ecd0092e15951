"""The critic's loss against numbers worked out by hand, and against numerical gradients."""

import math

import pytest
import torch

from stages.lib.rl.value_loss import explained_variance, value_loss_terms

NAN = math.nan


def test_value_loss_by_hand():
    # e = 0.2; old V 0.5 throughout:
    #   V 1.0, G 2: V_clip 0.7: max(1.00, 1.69) / 2 = 0.845 clipped
    #   V 1.0, G 0: V_clip 0.7: max(1.00, 0.49) / 2 = 0.5   not clipped
    #   V 0.6, G 1: V_clip 0.6:           0.16  / 2 = 0.08
    # sum 1.425; without the half 2.85; with min for max 0.245 + 0.5 + 0.08 = 1.07...
    values = torch.tensor([[1.0, 1.0], [0.6, 3.0]], requires_grad=True)
    terms = value_loss_terms(
        values,
        torch.full((2, 2), 0.5),
        torch.tensor([[2.0, 0.0], [1.0, 9.0]]),
        torch.tensor([[True, True], [True, False]]),
        clip_range=0.2,
    )
    terms.loss_sum.backward()
    assert terms.loss_sum.item() == pytest.approx(1.425, abs=1e-6)
    assert terms.clipped_sum.item() == 1
    # V - G where the plain value is the loss (whole, not half, inside the range), 0 where the clipped one is.
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, 1.0], [-0.4, 0.0]]))


def test_value_gradient_is_the_numerical_one():
    generator = torch.Generator().manual_seed(0)
    values, old_values, returns = (torch.randn(3, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    mask = torch.arange(4) < torch.tensor([[4], [2], [1]])
    assert torch.autograd.gradcheck(
        lambda x: value_loss_terms(x, old_values, returns, mask, 0.4).loss_sum, values.requires_grad_()
    )


def test_a_critic_inside_the_range_is_never_counted_as_clipped():
    # old + (V - old) is not V in floating point; such roundings must not be counted, nor change the loss.
    generator = torch.Generator().manual_seed(0)
    values, returns = (1e-3 * torch.randn(50, 20, generator=generator) for _ in range(2))
    old_values = values + 0.1 * torch.rand(50, 20, generator=generator)
    terms = value_loss_terms(values, old_values, returns, torch.ones(50, 20, dtype=torch.bool), 0.2)
    assert terms.clipped_sum.item() == 0
    assert terms.loss_sum.item() == 0.5 * ((values - returns) ** 2).sum().item()


@pytest.mark.parametrize("garbage", [1e30, NAN])
def test_masked_positions_change_neither_value_loss_nor_gradient(garbage):
    mask = torch.tensor([[True, False]])
    values = torch.tensor([[1.0, garbage]], requires_grad=True)
    old_values, returns = torch.tensor([[0.9, garbage]]), torch.tensor([[3.0, garbage]])
    terms = value_loss_terms(values, old_values, returns, mask, 0.2)
    terms.loss_sum.backward()
    assert terms.loss_sum.item() == 2.0
    assert values.grad.tolist() == [[-2.0, 0.0]]


def test_explained_variance_by_hand():
    # G (1, 2, 3), V (1, 2, 4): G - V = (0, 0, -1) of variance 2/9, G of variance 2/3: 1 - 1/3.
    # A constant off by 10 explains as much; the mean of squares in place of the variance would say otherwise.
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, NAN]]), torch.tensor([[True, True, True, False]])
    values = torch.tensor([[1.0, 2.0, 4.0, 7.0]])
    assert explained_variance(values, returns, mask) == pytest.approx(2 / 3)
    assert explained_variance(values + 10, returns, mask) == pytest.approx(2 / 3)
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.zeros(1, 4), returns, mask) == 0.0
    assert explained_variance(values, torch.ones(1, 4), mask) == 0.0


def test_sums_of_parts_are_the_sums_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    batch = [torch.randn(4, 5, dtype=torch.float64, generator=generator) for _ in range(3)]
    mask = torch.arange(5) < torch.tensor([[5], [1], [2], [4]])
    whole = value_loss_terms(*batch, mask, 0.2)
    parts = [value_loss_terms(*(x[rows] for x in batch), mask[rows], 0.2) for rows in ([0], [1, 2, 3])]
    for name in whole._fields:
        assert getattr(whole, name).item() == pytest.approx(sum(getattr(part, name).item() for part in parts))


def test_only_the_current_network_gets_a_gradient():
    tensors = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
    terms = value_loss_terms(*tensors, torch.ones(2, 3, dtype=torch.bool), 0.2)
    terms.loss_sum.backward()
    assert [tensor.grad is None for tensor in tensors] == [False, True, True]
    assert [value.requires_grad for value in terms] == [True] + [False] * (len(terms) - 1)
