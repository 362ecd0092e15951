import math
from types import SimpleNamespace

import pytest
import torch

from stages.lib.rl.policy_losses import POLICY_LOSSES

NAN = math.nan
CLIP = SimpleNamespace(clip_range=0.2)
clip_loss = POLICY_LOSSES["clip"]


def test_policy_loss_by_hand():
    # e = 0.2; five tokens that count, one that does not:
    #   ratio 1.5, A  2: min( 3.0,  2.4) =  2.4 clipped        k3: 0.5 - ln 1.5  = 0.094535
    #   ratio 1.5, A -1: min(-1.5, -1.2) = -1.5 not clipped    k3:                 0.094535
    #   ratio 0.5, A  2: min( 1.0,  1.6) =  1.0 not clipped    k3: -0.5 - ln 0.5 = 0.193147
    #   ratio 0.5, A -1: min(-0.5, -0.8) = -0.8 clipped        k3:                 0.193147
    #   ratio 1.1, A  3: 3.3 inside the range                  k3: 0.1 - ln 1.1  = 0.004690
    # loss -(2.4 - 1.5 + 1.0 - 0.8 + 3.3) = -4.4, k3 0.580054. Reversed, log(old / new), k3 would sum to 0.618.
    old_logps = torch.tensor([[-2.0, -1.0, -3.0], [-1.0, -0.5, -1.0]])
    ratios = torch.tensor([[1.5, 1.5, 0.5], [0.5, 1.1, 4.0]])
    terms = clip_loss(
        old_logps + ratios.log(),
        old_logps,
        torch.tensor([[2.0, -1.0, 2.0], [-1.0, 3.0, 50.0]]),
        torch.tensor([[True, True, True], [True, True, False]]),
        CLIP,
    )
    assert terms.loss_sum.item() == pytest.approx(-4.4, abs=1e-5)
    assert terms.clipped_sum.item() == 2
    assert terms.approx_kl_sum.item() == pytest.approx(0.580054, abs=1e-5)


def test_policy_gradient_by_hand():
    # d/dlogp of -ratio A is -ratio A where the plain branch is the loss, 0 where the clipped one is (tokens as above).
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1]], dtype=torch.float64)
    advantages = torch.tensor([[2.0, -1.0, 2.0, -1.0, 3.0]], dtype=torch.float64)
    logps = ratios.log().requires_grad_()
    terms = clip_loss(logps, torch.zeros_like(ratios), advantages, torch.ones(1, 5, dtype=torch.bool), CLIP)
    terms.loss_sum.backward()
    torch.testing.assert_close(logps.grad, torch.tensor([[0.0, 1.5, -1.0, 0.0, -3.3]], dtype=torch.float64))


def test_policy_gradient_is_the_numerical_one():
    generator = torch.Generator().manual_seed(0)
    logps, old_logps, advantages = (
        torch.randn(3, 4, dtype=torch.float64, generator=generator) * scale for scale in (0.3, 0.3, 1.0)
    )
    mask = torch.arange(4) < torch.tensor([[4], [2], [1]])
    assert torch.autograd.gradcheck(
        lambda x: clip_loss(x, old_logps, advantages, mask, CLIP).loss_sum, logps.requires_grad_()
    )


def test_on_the_first_minibatch_the_loss_is_minus_the_mean_advantage():
    generator = torch.Generator().manual_seed(0)
    logps, advantages = torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)
    mask = torch.arange(4) < torch.tensor([[4], [2], [1]])
    current = logps.clone().requires_grad_()
    terms = clip_loss(current, logps, advantages, mask, CLIP)
    loss = terms.loss_sum / mask.sum()
    loss.backward()
    assert loss.item() == pytest.approx(-advantages[mask].mean().item(), rel=1e-6)
    assert terms.clipped_sum.item() == 0
    assert terms.approx_kl_sum.item() == 0
    # The whole policy gradient, not half of it, though both branches are equal here.
    torch.testing.assert_close(current.grad, torch.where(mask, -advantages / mask.sum(), 0.0))


@pytest.mark.parametrize("garbage", [1e4, -1e4, NAN, math.inf])
def test_masked_positions_change_neither_policy_loss_nor_gradient(garbage):
    mask = torch.tensor([[True, False]])
    logps = torch.tensor([[-1.0, garbage]], requires_grad=True)
    terms = clip_loss(logps, torch.tensor([[-1.1, -1.0]]), torch.tensor([[2.0, garbage]]), mask, CLIP)
    terms.loss_sum.backward()
    assert terms.loss_sum.item() == pytest.approx(-2 * math.exp(0.1))
    assert terms.approx_kl_sum.item() == pytest.approx(math.exp(0.1) - 1.1, abs=1e-6)
    torch.testing.assert_close(logps.grad, torch.tensor([[-2 * math.exp(0.1), 0.0]]))


def test_sums_of_parts_are_the_sums_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    batch = [torch.randn(4, 5, dtype=torch.float64, generator=generator) for _ in range(3)]
    mask = torch.arange(5) < torch.tensor([[5], [1], [2], [4]])
    whole = clip_loss(*batch, mask, CLIP)
    parts = [clip_loss(*(x[rows] for x in batch), mask[rows], CLIP) for rows in ([0], [1, 2, 3])]
    for name in whole._fields:
        assert getattr(whole, name).item() == pytest.approx(sum(getattr(part, name).item() for part in parts))


def test_only_the_current_network_gets_a_gradient():
    tensors = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
    terms = clip_loss(*tensors, torch.ones(2, 3, dtype=torch.bool), CLIP)
    terms.loss_sum.backward()
    assert [tensor.grad is None for tensor in tensors] == [False, True, True]
    assert [value.requires_grad for value in terms] == [True] + [False] * (len(terms) - 1)
