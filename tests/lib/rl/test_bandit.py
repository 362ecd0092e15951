"""Each algorithm ends where it must, on a bandit whose optimum is known: from five seeds, within 0.02 in variation."""

from functools import partial

import pytest
import torch

from stages import train_grpo, train_ppo
from stages.lib.rl.advantages import gae, group_relative
from stages.lib.rl.token_rewards import token_rewards
from stages.lib.rl.value_loss import value_loss_terms
from stages.lib.settings.declaration import block
from stages.lib.settings.kl_controller import FixedKl
from stages.lib.settings.kl_penalty import KlInLoss, KlInReward
from stages.lib.settings.sections import default_params
from stages.lib.settings.train_grpo import TrainGrpo
from stages.lib.settings.train_ppo import TrainPpo
from tests.lib.rl.bandit import (
    BATCH,
    BETA,
    SEEDS,
    Engine,
    enumerated,
    of_forward_kl,
    of_reverse_kl,
    sampled,
    total_variation,
)

PHASES, MINIBATCHES = 120, 2
IN_REWARD = block(KlInReward, controller=block(FixedKl, coef=BETA))
K2_IN_LOSS, K3_IN_LOSS = (block(KlInLoss, estimator=estimator, coef=BETA) for estimator in ("k2", "k3"))
# Where the coefficient acts as it stands.
PLAIN = [
    pytest.param(IN_REWARD, of_reverse_kl, id="k1 in the reward"),
    pytest.param(K2_IN_LOSS, of_reverse_kl, id="k2 in the loss"),
    pytest.param(K3_IN_LOSS, of_forward_kl, id="k3 in the loss"),
    pytest.param(K3_IN_LOSS | {"bias_correction": True}, of_reverse_kl, id="k3 in the loss, corrected"),
]


def settings_of(stage, model, name, **changes):
    return model.model_validate(default_params()[stage][name] | changes)


def learn(advantages_of, loss, group_size=1):
    """The policies (seeds, arms) after all phases: plain gradient descent, at a rate that falls to a hundredth."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    engine = Engine()
    for number in range(PHASES):
        phase = sampled(engine, generators, group_size)
        rollouts, advantages = advantages_of(phase.rollouts)
        for one in phase.passes(engine, MINIBATCHES):
            total = loss(advantages, rollouts, one)["loss"] * MINIBATCHES / BATCH
            (gradient,) = torch.autograd.grad(total, engine.logits)
            with torch.no_grad():
                engine.logits -= 2.0 * 0.01 ** (number / PHASES) * gradient
    return engine.policies


class Critic:
    """A value for each seed, learned by PPO's value loss."""

    def __init__(self):
        self.values = torch.zeros(len(SEEDS), dtype=torch.float64)

    def advantages(self, settings, rollouts):
        values = self.values.repeat_interleave(BATCH)[:, None]
        rollouts = rollouts._replace(values=values)
        advantages, returns = gae(rollouts, settings)
        moving = self.values.clone().requires_grad_()
        current = moving.repeat_interleave(BATCH)[:, None]
        terms = value_loss_terms(current, values, returns, rollouts.response_mask, settings.value_clip_range)
        self.values -= 0.5 * torch.autograd.grad(terms.loss_sum / BATCH, moving)[0]
        return rollouts, advantages


def by_ppo(kl):
    settings = settings_of("train_ppo", TrainPpo, "ppo", whiten_advantages=False, kl=kl)
    critic = Critic()

    def advantages_of(rollouts):
        coef = kl["controller"]["coef"] if kl["type"] == "in_reward" else 0.0
        rewards = token_rewards(rollouts.kl("k1"), rollouts.scores, rollouts.response_mask, coef)
        return critic.advantages(settings, rollouts._replace(rewards=rewards))

    return learn(advantages_of, partial(train_ppo.policy_loss, settings))


def by_grpo(group_size):
    settings = settings_of("train_grpo", TrainGrpo, "grpo", advantage_scale="none", kl_coef=BETA)
    return learn(
        lambda rollouts: (rollouts, group_relative(rollouts, settings)[0]),
        partial(train_grpo.grpo_loss, settings),
        group_size,
    )


def test_the_optima_are_those_of_all_policies():
    for optimum, forward, known in (
        (of_reverse_kl, False, (0.529, 0.292, 0.179)),
        (of_forward_kl, True, (0.566, 0.222, 0.213)),
    ):
        assert optimum(BETA).sum() == pytest.approx(1, abs=1e-9)
        assert optimum(BETA).tolist() == pytest.approx(known, abs=6e-4)
        assert optimum(BETA).tolist() == pytest.approx(enumerated(BETA, forward=forward).tolist(), abs=1.5e-3)
    beta = BETA * 8 / 7
    assert of_reverse_kl(beta).tolist() == pytest.approx((0.486, 0.304, 0.211), abs=6e-4)
    assert of_forward_kl(beta).tolist() == pytest.approx((0.526, 0.239, 0.235), abs=6e-4)


@pytest.mark.parametrize(("kl", "optimum"), PLAIN)
def test_ppo(kl, optimum):
    assert total_variation(by_ppo(kl), optimum(BETA)).max() < 0.02


@pytest.mark.parametrize("group_size", [8, 64])
def test_grpo(group_size):
    beta = BETA * (8 / 7 if group_size == 8 else 1)
    assert total_variation(by_grpo(group_size), of_forward_kl(beta)).max() < 0.02
