"""Which tokens the policy's loss counts."""

import math

import torch

from stages.lib.rl.token_masks import highest_entropy, still_on_policy, without_truncated
from tests.lib.rl.test_rollouts import read

NAN = math.nan
MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])


def test_responses_that_do_not_end_leave_the_loss_and_its_denominators() -> None:
    rollouts = read(1000, packing=False)
    counted = without_truncated(rollouts)
    assert rollouts.ended.tolist() == [True, True, False]
    assert counted.response_mask.sum(dim=-1).tolist() == [2, 4, 0]
    assert torch.equal(counted.logps, rollouts.logps)


def test_the_tokens_of_highest_entropy_by_hand() -> None:
    # 0.1, 0.5, 0.3, 0.9, 0.2: the 0.6-quantile is 0.34, above which are 0.5 and 0.9; the 0.5-quantile is 0.3 itself.
    entropies = torch.tensor([[0.1, 0.5, 0.3, NAN], [0.9, 0.2, 7.0, 7.0]])
    nothing = [False, False]
    assert highest_entropy(entropies, MASK, 0.4).tolist() == [[False, True, False, False], [True, False, *nothing]]
    assert highest_entropy(entropies, MASK, 0.5).tolist() == [[False, True, True, False], [True, False, *nothing]]
    assert torch.equal(highest_entropy(entropies, MASK, 1.0), MASK)


def test_it_is_the_quantile_of_torch() -> None:
    entropies, mask = torch.rand(20, 17, dtype=torch.float64), torch.rand(20, 17) < 0.7
    for share in (0.01, 0.2, 1 / 3, 0.999):
        edge = entropies[mask].quantile(1 - share)
        assert torch.equal(highest_entropy(entropies, mask, share), mask & (entropies >= edge))
    assert not highest_entropy(entropies, torch.zeros_like(mask), 0.2).any()


def test_bad_responses_that_were_left_behind_by_hand() -> None:
    # Fallen by (0.2 + 0.8 + 0.5) / 3 = 0.5 and by (0.1 + 0.5) / 2 = 0.3 nats a token.
    old_logps = torch.zeros(2, 4)
    logps = -torch.tensor([[0.2, 0.8, 0.5, NAN], [0.1, 0.5, 9.0, 9.0]])
    bad = -torch.ones(2, 4)
    assert still_on_policy(logps, old_logps, bad, MASK, 0.4)[:, 0].tolist() == [False, True]
    assert still_on_policy(logps, old_logps, bad, MASK, 0.6).all()
    assert still_on_policy(logps, old_logps, -bad, MASK, 0.1).all()  # good ones are never left out
    assert still_on_policy(-logps, old_logps, bad, MASK, 0.1).all()  # nor those that have become likelier
