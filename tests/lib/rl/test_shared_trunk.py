"""A policy with a value head: its values, the gradient of both losses together, and a head that warms up alone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.lib.models.policy_with_values import PolicyWithValues
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.episodes import Episode
from stages.lib.rl.learner import Pass
from stages.lib.rl.ppo_loss import PpoLoss
from stages.lib.rl.rollouts import Rollouts, read_rollouts
from stages.lib.settings.critic import SharedTrunk
from stages.lib.settings.declaration import block
from stages.lib.settings.kl_penalty import NoKl
from stages.lib.settings.policy_loss import ClipLoss
from tests.lib.rl.test_rollouts import EPISODES
from tests.tiny_models import batching, tiny_llama

COEF = 0.3
SETTINGS: Any = SimpleNamespace(
    critic=SharedTrunk(**block(SharedTrunk, coef=COEF)),
    loss=ClipLoss(**block(ClipLoss)),
    kl=NoKl(**block(NoKl)),
    temperature=1.0,
    reuse_sampler_logps=False,
    value_clip_range=0.5,
)


def with_values(seed: int) -> PolicyWithValues:
    return PolicyWithValues(tiny_llama(seed), chunk_tokens=4, entropy_gradient=False, seed=3)


def read(policy: PolicyWithValues, episodes: list[Episode] = EPISODES) -> Rollouts:
    return read_rollouts(episodes, [0.5, 1.5, 2.5], policy, TokenLogProbs(tiny_llama(2)), None, 1.0, batching(1000))


def alone(seed: int, row: int) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A model by itself, and of an episode's tokens the log-probs and the states that they are drawn from."""
    model = tiny_llama(seed)
    prompt, response = EPISODES[row].prompt.ids, EPISODES[row].ids
    ids = torch.tensor([prompt + response])
    states = model.model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
    logps = torch.log_softmax(model.lm_head(states), dim=-1).gather(1, torch.tensor(response)[:, None])[:, 0]
    return model, logps, states


def test_the_values_are_those_of_the_states_that_tokens_are_drawn_from() -> None:
    policy = with_values(1)
    rollouts = read(policy)
    head = torch.empty(1, 16).normal_(std=1 / 17, generator=torch.Generator().manual_seed(3))
    assert torch.equal(policy.value_head.weight.detach(), head)
    for row, episode in enumerate(EPISODES):
        _, logps, states = alone(1, row)
        length = len(episode.ids)
        assert rollouts.values[row, :length].tolist() == pytest.approx((states @ head[0]).tolist(), abs=1e-5)
        assert rollouts.logps[row, :length].tolist() == pytest.approx(logps.tolist(), abs=1e-5)
        assert rollouts.values[row, length:].count_nonzero() == 0


def test_values_are_read_where_the_samplers_log_probs_are_kept() -> None:
    kept = [
        episode._replace(engine_logps=[-1.0] * len(episode.ids), engine_entropies=[0.5] * len(episode.ids))
        for episode in EPISODES
    ]
    policy = with_values(1)
    rollouts = read(policy, kept)
    assert torch.equal(rollouts.values, read(policy).values)
    assert torch.equal(rollouts.logps, torch.where(rollouts.response_mask, -1.0, 0.0))


def loss_of(policy: PolicyWithValues, rollouts: Rollouts, *, warms_up: bool) -> dict[str, torch.Tensor]:
    """Of advantages 1, −0.5 and 2 and returns 0.7, with the gradient in the module."""
    (batch,) = batching(1000).sequences(rollouts.prompts, rollouts.responses)
    advantages = torch.where(rollouts.response_mask, torch.tensor([[1.0], [-0.5], [2.0]]), 0.0)
    returns = torch.full_like(rollouts.values, 0.7)
    policy.body_learns_values = not warms_up
    one: Any = Pass(policy, batch, batch.rows)
    losses = PpoLoss(SETTINGS, advantages, returns)
    sums = (losses.of_head if warms_up else losses.of_both)(rollouts, one)
    sums["loss"].backward()
    return {name: float(value.detach()) for name, value in sums.items()}


def test_the_gradient_is_that_of_both_losses_worked_out_one_by_one() -> None:
    rollouts, policy = read(with_values(1)), with_values(5)
    sums = loss_of(policy, rollouts, warms_up=False)
    head = policy.value_head.weight.detach().clone().requires_grad_()
    total, of_values, found = 0.0, 0.0, None
    for row, advantage in enumerate([1.0, -0.5, 2.0]):
        model, logps, states = alone(5, row)
        length = len(logps)
        ratio = (logps - rollouts.logps[row, :length]).exp()
        of_policy = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
        values, old = (states @ head[0]), rollouts.values[row, :length]
        errors = torch.maximum((values - 0.7) ** 2, (values.clamp(old - 0.5, old + 0.5) - 0.7) ** 2)
        loss = of_policy + COEF * 0.5 * errors.sum()
        loss.backward()
        total, of_values = total + loss.item(), of_values + 0.5 * errors.sum().item()
        gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
        found = gradient if found is None else found + gradient
    ours = torch.cat([weight.grad.flatten() for weight in policy.language_model.parameters()])
    assert sums["loss"] == pytest.approx(total, rel=1e-4)
    assert sums["value/loss"] == pytest.approx(of_values, rel=1e-4)
    assert torch.allclose(ours, found, atol=1e-4)
    assert torch.allclose(policy.value_head.weight.grad, head.grad, atol=1e-4)


def test_a_head_that_warms_up_moves_nothing_else() -> None:
    rollouts, policy = read(with_values(1)), with_values(1)
    sums = loss_of(policy, rollouts, warms_up=True)
    assert sums["loss"] == pytest.approx(COEF * sums["value/loss"])
    assert all(weight.grad is None for weight in policy.language_model.parameters())
    assert policy.value_head.weight.grad.abs().min() > 0
