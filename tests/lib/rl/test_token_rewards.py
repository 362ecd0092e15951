"""Where scores and KL penalties are paid."""

import math

import torch

from stages.lib.rl.token_rewards import token_rewards, whitened_rewards

NAN = math.nan


def test_token_rewards_by_hand():
    # row 0: -0.5 * (0.1, 0.2, 0.3) + (0, 0, 2);  row 1, two tokens: -0.5 * (0.5, 0.6) + (0, -1), padding 0
    rewards = token_rewards(
        torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.6, NAN]]),
        torch.tensor([2.0, -1.0]),
        torch.tensor([[True, True, True], [True, True, False]]),
        kl_coef=0.5,
    )
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, -0.1, 1.85], [-0.25, -1.3, 0.0]]))


def test_the_score_is_paid_at_the_last_real_token_wherever_padding_is():
    mask = torch.tensor([[False, True, True, False], [True, False, True, False], [False, False, False, True]])
    rewards = token_rewards(torch.zeros(3, 4), torch.tensor([1.0, 2.0, 3.0]), mask, kl_coef=0.5)
    assert rewards.tolist() == [[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 3.0]]


def test_an_episode_pays_its_score_once_and_its_kl_once():
    generator = torch.Generator().manual_seed(1)
    kl, scores = torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator)
    mask = torch.arange(6) < torch.tensor([[1], [6], [3], [0]])
    rewards = token_rewards(kl, scores, mask, kl_coef=0.3)
    expected = [scores[row].item() - 0.3 * kl[row, :length].sum().item() for row, length in enumerate([1, 6, 3])]
    # A response without tokens has nothing to be paid for.
    torch.testing.assert_close(rewards.sum(1), torch.tensor([*expected, 0.0]))


def test_whitened_rewards_have_variance_1_and_their_own_mean() -> None:
    # 1, 2, 6: mean 3, variance (4 + 1 + 9) / 3 = 14 / 3; (1 - 3) / sqrt(14 / 3) + 3 = 2.074180
    mask = torch.tensor([[True, True], [True, False]])
    whitened = whitened_rewards(torch.tensor([[1.0, 2.0], [6.0, NAN]]), mask)
    torch.testing.assert_close(whitened, torch.tensor([[2.074180, 2.537090], [4.388730, 0.0]]))


def test_without_a_reference_the_score_is_all_there_is() -> None:
    rewards = token_rewards(None, torch.tensor([2.0]), torch.tensor([[True, True]]), kl_coef=0.0)
    assert rewards.tolist() == [[0.0, 2.0]]
