import math
from types import SimpleNamespace

import pytest
import torch
from pydantic import TypeAdapter

from stages.lib.command.errors import StageError
from stages.lib.data.prompts import Prompt
from stages.lib.rl.advantages import (
    ADVANTAGES,
    decoupled_advantages,
    gae,
    generalized_advantages,
    group_relative_advantages,
    group_summary,
    masked_moments,
    whiten,
    without_variance,
)
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rollouts import Rollouts
from stages.lib.settings.advantages import Advantages, GroupRelative

NAN = math.nan


def episodes(lengths: list[int], width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random rewards and values, NaN beyond each length, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    rewards, values = (torch.randn(len(lengths), width, dtype=torch.float64, generator=generator) for _ in range(2))
    return torch.where(mask, rewards, NAN), torch.where(mask, values, NAN), mask


def test_generalized_advantages_by_hand():
    # gamma 0.9, lambda 0.8, rewards (1, 0, 2), values (0.5, 1, 1.5):
    # delta_2 = 2 - 1.5 = 0.5;  delta_1 = 0 + 0.9 * 1.5 - 1 = 0.35;  delta_0 = 1 + 0.9 * 1 - 0.5 = 1.4
    # A_2 = 0.5;  A_1 = 0.35 + 0.72 * 0.5 = 0.71;  A_0 = 1.4 + 0.72 * 0.71 = 1.9112;  G = A + V
    # The 9 after the end must not be bootstrapped from: delta_2 would be 0.5 + 0.9 * 9.
    advantages, returns = generalized_advantages(
        torch.tensor([[1.0, 0.0, 2.0, 7.0]]),
        torch.tensor([[0.5, 1.0, 1.5, 9.0]]),
        torch.tensor([[True, True, True, False]]),
        gamma=0.9,
        lam=0.8,
    )
    torch.testing.assert_close(advantages, torch.tensor([[1.9112, 0.71, 0.5, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[2.4112, 1.71, 2.0, 0.0]]))


@pytest.mark.parametrize(("gamma", "lam"), [(0.97, 0.9), (1.0, 0.95), (0.5, 0.0), (0.0, 1.0)])
def test_generalized_advantages_equal_the_sum_of_discounted_deltas(gamma, lam):
    lengths = [5, 1, 3]
    rewards, values, mask = episodes(lengths, 5)
    advantages, returns = generalized_advantages(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        r, v = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t))
            assert advantages[row, t].item() == pytest.approx(expected, rel=1e-12)
            assert returns[row, t].item() == pytest.approx(expected + v[t], rel=1e-12)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_with_gamma_and_lambda_1_returns_are_the_rewards_to_go_whatever_the_critic_says():
    rewards, values, mask = episodes([4, 2], 4)
    _, returns = generalized_advantages(rewards, values, mask, 1.0, 1.0)
    to_go = torch.where(mask, rewards, 0.0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, torch.where(mask, to_go, 0.0))


def test_masked_positions_anywhere_are_as_if_absent():
    rewards, values, mask = episodes([4, 4], 4)
    expected = generalized_advantages(rewards, values, mask, 0.9, 0.8)
    where = [1, 2, 4, 6]  # padding on the left, in the middle and on the right
    spread = [torch.full((2, 8), NAN, dtype=torch.float64) for _ in range(2)]
    spread_mask = torch.zeros(2, 8, dtype=torch.bool)
    spread[0][:, where], spread[1][:, where], spread_mask[:, where] = rewards, values, True
    for found, wanted in zip(generalized_advantages(*spread, spread_mask, 0.9, 0.8), expected, strict=True):
        torch.testing.assert_close(found[:, where], wanted)
        assert not found[~spread_mask].any()


def test_half_precision_values_do_not_round_the_advantages():
    # 1000 + 0.5 has no bfloat16; 0.5 - 0.25 + 1000 + 0.25 = 1000.5
    mask = torch.ones(1, 2, dtype=torch.bool)
    _, returns = generalized_advantages(
        torch.tensor([[1000.0, 0.5]]), torch.tensor([[0.25, 0.25]]).bfloat16(), mask, 1.0, 1.0
    )
    assert returns.tolist() == [[1000.5, 0.5]]


def test_moments_by_hand():
    # unmasked: 1, 2, -4: sum -1, squares 1 + 4 + 16 = 21, count 3
    total, squares, count = masked_moments(
        torch.tensor([[1.0, 2.0, NAN], [-4.0, 100.0, 100.0]]),
        torch.tensor([[True, True, False], [True, False, False]]),
    )
    assert (total.item(), squares.item(), count.item()) == (-1.0, 21.0, 3.0)
    assert {total.dtype, squares.dtype, count.dtype} == {torch.float64}


def test_whiten_by_hand():
    # 1, 3 and 5 have mean 3 and population variance (4 + 0 + 4) / 3 = 8/3: ±2 / sqrt(8/3) = ±1.224745
    whitened = whiten(
        torch.tensor([[1.0, 3.0, 5.0, NAN]]), torch.tensor([[True, True, True, False]]), 3.0, torch.tensor(8 / 3)
    )
    torch.testing.assert_close(whitened, torch.tensor([[-1.224745, 0.0, 1.224745, 0.0]]), atol=1e-6, rtol=0)


def whitened_by_own_moments(advantages: torch.Tensor, mask: torch.Tensor, shards: int) -> torch.Tensor:
    """As a run on `shards` processes does it: moments summed over shards, then each shard whitened."""
    pieces = list(zip(advantages.chunk(shards), mask.chunk(shards), strict=True))
    total, squares, count = (sum(parts) for parts in zip(*(masked_moments(*piece) for piece in pieces), strict=True))
    mean = total / count
    return torch.cat([whiten(*piece, mean, squares / count - mean**2) for piece in pieces])


def test_whitened_advantages_have_mean_0_and_variance_1_over_all_shards():
    _, advantages, mask = episodes([5, 1, 3, 4], 5)
    whole = whitened_by_own_moments(5 + 3 * advantages.float(), mask, shards=1)
    kept = whole[mask].double()
    assert kept.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert kept.var(unbiased=False).item() == pytest.approx(1.0, abs=1e-6)
    assert not whole[~mask].any()
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whitened_by_own_moments(5 + 3 * advantages.float(), mask, shards=2), whole)


def test_more_padding_changes_no_moment_and_no_whitened_value():
    _, advantages, mask = episodes([3, 2], 3)
    wider = torch.cat([advantages, torch.full((2, 4), 1e30, dtype=torch.float64)], dim=1)
    wider_mask = torch.cat([mask, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    assert masked_moments(wider, wider_mask) == masked_moments(advantages, mask)
    whitened = whitened_by_own_moments(wider, wider_mask, 1)
    assert torch.equal(whitened[:, :3], whitened_by_own_moments(advantages, mask, 1))
    assert not whitened[:, 3:].any()


@pytest.mark.parametrize("value", [1.0, 1e5 / 3])
def test_equal_advantages_whiten_to_about_0_not_to_nan(value):
    # 33333.3: the sum of squares minus the squared mean may come out a little below 0.
    advantages = torch.full((3, 7), value)
    assert whitened_by_own_moments(advantages, torch.ones(3, 7, dtype=torch.bool), 1).abs().max() < 1e-3
    torch.testing.assert_close(whiten(torch.ones(1, 1), torch.ones(1, 1).bool(), 1.0, -1e-6), torch.zeros(1, 1))


def test_float32_moments_of_a_small_spread_around_a_large_mean_keep_their_digits():
    # 1000 ± 0.125 (exact in float32): variance 1/64. A float32 sum of squares around 1e6 has lost it.
    values = torch.tensor([[1000.125, 999.875]]).repeat(50, 10)
    total, squares, count = masked_moments(values, torch.ones_like(values).bool())
    assert (squares / count - (total / count) ** 2).item() == pytest.approx(1 / 64, rel=1e-6)


def test_targets_carry_no_gradient():
    values = torch.randn(1, 3, requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    for result in (*generalized_advantages(values, values, mask, 1.0, 1.0), whiten(values, mask, 0.0, 1.0)):
        assert not result.requires_grad


def test_advantages_in_a_group_by_hand():
    # Rewards 1, 2, 6: mean 3, deviations -2, -1, 3, squares 4 + 1 + 9 = 14, divided by 3 - 1: s = sqrt 7 = 2.6458.
    # With the population's s, sqrt(14 / 3), the first would be -0.926.
    rewards = torch.tensor([[1.0, 2.0, 6.0], [-1.0, -1.0, -1.0]])
    advantages = group_relative_advantages(rewards, scale="group_std", epsilon=1e-4)
    assert advantages[0].tolist() == pytest.approx([-2 / 2.64585, -1 / 2.64585, 3 / 2.64585], abs=1e-4)
    assert advantages[1].tolist() == [0, 0, 0]
    advantages = group_relative_advantages(rewards, scale="none", epsilon=1e-4)
    assert advantages.tolist() == [[-2, -1, 3], [0, 0, 0]]


def test_epsilon_bounds_what_becomes_of_next_to_no_difference():
    # s = 1e-5 * sqrt 2 is a seventh of epsilon 1e-4.
    advantages = group_relative_advantages(torch.tensor([[0.0, 2e-5]]), scale="group_std", epsilon=1e-4)
    assert advantages[0].tolist() == pytest.approx([-1e-5 / (1.41421e-5 + 1e-4), 1e-5 / (1.41421e-5 + 1e-4)], rel=1e-3)


@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.7, 1e4])
def test_a_group_without_variance_has_no_advantage_at_all(value):
    """The mean of equal numbers is not always that number."""
    for size in (3, 6, 7):
        rewards = torch.full((1, size), value, dtype=torch.float64)
        assert group_relative_advantages(rewards, scale="group_std", epsilon=1e-9).count_nonzero() == 0
        assert without_variance(rewards).tolist() == [True]
    assert without_variance(torch.tensor([[1.0, 1.0], [1.0, 1.5]])).tolist() == [True, False]


def test_all_tokens_of_a_response_share_its_advantage():
    prompts = [Prompt(0, [1], [], {}), Prompt(1, [2], [], {})]
    episodes = [
        Episode(prompt, [5] * 3, "", True, sample, None, [True] * 3) for prompt in prompts for sample in range(2)
    ]
    mask = torch.arange(3) < torch.tensor([[3], [1], [2], [2]])
    numbers, rewards = torch.zeros(4, 3), torch.zeros(4, 3)
    rewards[:, 0] = torch.tensor([2.0, 3.0, 5.0, 5.0])
    rewards[0, 2] = -1.0  # what counts is the sum, 1
    rollouts = Rollouts(episodes, numbers[:, 0], rewards, mask, *[numbers] * 4)
    advantages = ADVANTAGES["group_relative"](
        rollouts, GroupRelative(type="group_relative", scale="none", epsilon=1e-4)
    )
    assert advantages.tolist() == [[-1, -1, -1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    summary = {"objective/rewards": 3.5, "group/distinct": 0.5, "group/without_variance": 0.5}
    assert group_summary(rollouts) == summary
    other = episodes[1]._replace(ids=[5, 5, 6])
    assert group_summary(rollouts._replace(episodes=[episodes[0], other, *episodes[2:]]))["group/distinct"] == 0.75


def test_gae_takes_rewards_values_and_settings() -> None:
    """Against its parts, which are tested by hand above."""
    generator = torch.Generator().manual_seed(3)
    rewards, values = torch.randn(2, 3, generator=generator), torch.randn(2, 3, generator=generator)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    episodes = [Episode(Prompt(row, [1], [], {}), [5], "", True, 0, None, [True]) for row in range(2)]
    rollouts = Rollouts(episodes, rewards[:, 0], rewards, mask, rewards, rewards, rewards, values)
    settings = SimpleNamespace(gamma=0.9, lam=0.8, whiten_advantages=False)
    expected = generalized_advantages(rewards, values, mask, 0.9, 0.8)
    plain, returns = gae(rollouts, settings)
    assert torch.equal(plain, expected[0])
    assert torch.equal(returns, expected[1])
    settings.whiten_advantages = True
    whitened, same = gae(rollouts, settings)
    assert torch.equal(same, expected[1])
    assert float(whitened[mask].mean()) == pytest.approx(0, abs=1e-6)
    assert float(whitened[mask].var(unbiased=False)) == pytest.approx(1, abs=1e-5)


def group_rollouts(rewards: list[list[float]], size: int, lengths: list[int] | None = None) -> Rollouts:
    """Groups of `size` responses with the rewards of their tokens, 0 beyond their lengths."""
    values = torch.tensor(rewards, dtype=torch.float64)
    lengths = lengths or [values.shape[1]] * len(values)
    episodes = [
        Episode(Prompt(7 + row // size, [1], [], {}), [5] * length, "", True, row % size, None, [True] * length)
        for row, length in enumerate(lengths)
    ]
    mask = torch.arange(values.shape[1]) < torch.tensor(lengths)[:, None]
    return Rollouts(episodes, values.sum(dim=1), torch.where(mask, values, 0.0), mask, *[torch.zeros_like(values)] * 4)


def advantages_of(rollouts: Rollouts, kind: str, **keys: object) -> torch.Tensor:
    settings = TypeAdapter(Advantages).validate_python({"type": kind, **keys})
    return ADVANTAGES[kind](rollouts, settings)


def test_leave_one_out_by_hand() -> None:
    # 1, 2, 6: 1 - 4, 2 - 3.5, 6 - 1.5; the same as 3/2 of the difference from the mean 3.
    found = advantages_of(group_rollouts([[1.0], [2.0], [6.0], [4.0], [4.0], [4.0]], 3), "leave_one_out")
    assert found[:, 0].tolist() == pytest.approx([-3, -1.5, 4.5, 0, 0, 0])


def test_the_scale_may_be_that_of_all_rewards_of_the_phase() -> None:
    # 0, 2 and 1, 5: means 1 and 3; all of them: mean 2, squares 4 + 0 + 1 + 9 = 14 over 3.
    found = advantages_of(
        group_rollouts([[0.0], [2.0], [1.0], [5.0]], 2), "group_relative", scale="batch_std", epsilon=1e-9
    )
    deviation = math.sqrt(14 / 3)
    assert found[:, 0].tolist() == pytest.approx([-1 / deviation, 1 / deviation, -2 / deviation, 2 / deviation])


def test_reinforce_by_hand() -> None:
    # Rewards to come with gamma 0.5: 1 + 0.5 * 2 = 2, 2; and 4. Their mean over three tokens: 8/3.
    rollouts = group_rollouts([[1.0, 2.0], [4.0, 0.0]], 1, [2, 1])
    found = advantages_of(rollouts, "reinforce", gamma=0.5, scale="none")
    assert found.flatten().tolist() == pytest.approx([2 - 8 / 3, 2 - 8 / 3, 4 - 8 / 3, 0])
    scaled = advantages_of(rollouts, "reinforce", gamma=0.5, scale="batch_std")
    deviation = math.sqrt((4 + 4 + 16) / 3 - (8 / 3) ** 2)
    torch.testing.assert_close(scaled, found / deviation)


def test_reinforce_with_a_baseline_by_hand() -> None:
    # One group: rewards to come 3, 2 (total 3) and 5 (total 5), less the group's mean total 4: -1, -2 and 1; their mean
    # over the tokens is -2/3. The other group has 1 and 1, less 1: 0 and 0.
    rollouts = group_rollouts([[1.0, 2.0], [5.0, 0.0], [1.0, 0.0], [1.0, 0.0]], 2, [2, 1, 1, 1])
    found = advantages_of(rollouts, "reinforce_baseline", gamma=1.0, scale="none")
    mean = -2 / 5
    assert found.flatten().tolist() == pytest.approx([-1 - mean, -2 - mean, 1 - mean, 0, -mean, 0, -mean, 0])
    kept = advantages_of(rollouts, "reinforce_baseline", gamma=1.0, scale="batch_std")[rollouts.response_mask]
    assert float(kept.mean()) == pytest.approx(0, abs=1e-9)
    assert float(kept.var(unbiased=False)) == pytest.approx(1)


def test_max_rl_by_hand() -> None:
    # 1 of 4 right: (1 - 1/4) / (1/4) = 3 and -1; none right, and all right: nothing.
    rewards = [1.0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    found = advantages_of(group_rollouts([[reward] for reward in rewards], 4), "max_rl")
    assert found[:, 0].tolist() == pytest.approx([3, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0])
    with pytest.raises(StageError, match=r"row 7 of the prompts: the reward is -0.5; advantages of type max_rl need"):
        advantages_of(group_rollouts([[1.0], [-0.5]], 2), "max_rl")


def test_gdpo_by_hand() -> None:
    # Group one: "right" 0, 1 and "short" 10, 0, of 2 samples each: z-scores ∓1/√2 and ±1/√2; weights 1 and 0.5.
    # Group two: "right" alike, "short" 0, 4 without the second one: alone, it says nothing.
    right = torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    short = torch.tensor([[10.0, 0.0], [0.0, NAN]], dtype=torch.float64)
    parts, weights = {"right": right, "short": short}, {"right": 1.0, "short": 0.5}
    found = decoupled_advantages(parts, weights, torch.zeros_like(right), epsilon=1e-12)
    z = 1 / math.sqrt(2)
    sums = torch.tensor([[-z + 0.5 * z, z - 0.5 * z], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found, sums / sums.std())
    assert found[1].tolist() == [0, 0]
    # Of group two the second response did not end, which costs 0.3: by the group's mean 0.15 either way.
    cut = torch.tensor([[0.0, 0.0], [0.0, -0.3]], dtype=torch.float64)
    found = decoupled_advantages(parts, weights, cut, epsilon=1e-12)
    sums[1] = torch.tensor([0.15, -0.15])
    torch.testing.assert_close(found, sums / sums.std())


def test_gdpo_reads_what_is_taken_off_a_truncated_response_as_it_is() -> None:
    """A penalty of twice the size is twice the distance, which standardised it would not be."""
    rollouts = group_rollouts([[1.0], [3.0], [2.0], [2.0]], 2)
    between = []
    for penalty in (0.5, 1.0):
        cut = rollouts._replace(rewards=rollouts.rewards - torch.tensor([[0.0], [0.0], [0.0], [penalty]]))
        found = advantages_of(cut, "gdpo", epsilon=1e-9)[:, 0]
        between.append(float((found[2] - found[3]) / (found[1] - found[0])))
    assert between == pytest.approx([0.5 / math.sqrt(2), 1.0 / math.sqrt(2)])


@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.7])
def test_gdpo_says_nothing_of_a_reward_that_is_alike(value: float) -> None:
    """The mean of equal numbers is not always that number."""
    for size in (3, 6, 7):
        part = torch.full((2, size), value, dtype=torch.float64)
        assert decoupled_advantages({"one": part}, {"one": 1.0}, part, epsilon=1e-12).count_nonzero() == 0


def test_gdpo_of_one_reward_is_group_relative_over_the_phase() -> None:
    rollouts = group_rollouts([[0.0], [2.0], [1.0], [5.0]], 2)
    found = advantages_of(rollouts, "gdpo", epsilon=1e-9)
    by_group = advantages_of(rollouts, "group_relative", scale="group_std", epsilon=1e-9)
    torch.testing.assert_close(found, by_group / by_group.std())


@pytest.mark.parametrize("kind", ["group_relative", "leave_one_out", "gdpo", "max_rl"])
def test_a_group_whose_rewards_are_alike_teaches_nothing(kind: str) -> None:
    keys = {"group_relative": {"scale": "batch_std", "epsilon": 1e-9}, "gdpo": {"epsilon": 1e-9}}.get(kind, {})
    found = advantages_of(group_rollouts([[1 / 3], [1 / 3], [1 / 3], [0.0], [1.0], [1.0]], 3), kind, **keys)
    assert found[:3].count_nonzero() == 0
    assert found[3:].count_nonzero() == 3
