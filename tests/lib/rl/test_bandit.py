"""Each algorithm ends where it must, on a bandit whose optimum is known: from five seeds, within 0.02 in variation."""

from functools import partial

import pytest
import torch

from stages.lib.rl.advantages import ADVANTAGES, gae
from stages.lib.rl.group_loss import step_loss
from stages.lib.rl.kl_control import new_controller
from stages.lib.rl.ppo_loss import PpoLoss
from stages.lib.rl.token_rewards import token_rewards
from stages.lib.rl.value_loss import value_loss_terms
from stages.lib.settings.advantages import GroupRelative, LeaveOneOut, Reinforce
from stages.lib.settings.declaration import block
from stages.lib.settings.kl_controller import AdaptiveKl, FixedKl
from stages.lib.settings.kl_penalty import KlInLoss, KlInReward
from stages.lib.settings.policy_loss import DapoLoss, PolicyLoss
from stages.lib.settings.sections import default_params
from stages.lib.settings.train_grpo import TrainGrpo
from stages.lib.settings.train_ppo import TrainPpo
from tests.lib.rl.bandit import (
    BATCH,
    BETA,
    SEEDS,
    START,
    Engine,
    enumerated,
    of_forward_kl,
    of_reverse_kl,
    sampled,
    seed_by_seed,
    total_variation,
)

PHASES, MINIBATCHES = 80, 2
DEFAULT_LOSS = block(DapoLoss, high=0.2)
IN_REWARD = block(KlInReward, controller=block(FixedKl, coef=BETA))
K2_IN_LOSS, K3_IN_LOSS = (
    block(KlInLoss, estimator=estimator, controller=block(FixedKl, coef=BETA)) for estimator in ("k2", "k3")
)
# Where the coefficient acts as it stands.
PLAIN = [
    pytest.param(IN_REWARD, of_reverse_kl, id="k1 in the reward"),
    pytest.param(K2_IN_LOSS, of_reverse_kl, id="k2 in the loss"),
    pytest.param(K3_IN_LOSS, of_forward_kl, id="k3 in the loss"),
    pytest.param(K3_IN_LOSS | {"bias_correction": True}, of_reverse_kl, id="k3 in the loss, corrected"),
]


def settings_of(stage, model, name, **changes):
    return model.model_validate(default_params()[stage][name] | changes)


def learn(advantages_of, loss_of, group_size=1):
    """The policies (seeds, arms) after all phases: plain gradient descent, at a rate that falls to a hundredth."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    engine = Engine()
    for number in range(PHASES):
        phase = sampled(engine, generators, group_size)
        rollouts, advantages = advantages_of(phase.rollouts)
        for one in phase.passes(engine, MINIBATCHES):
            total = loss_of(rollouts, advantages, one.rows)(rollouts, one)["loss"] * MINIBATCHES / BATCH
            (gradient,) = torch.autograd.grad(total, engine.logits)
            with torch.no_grad():
                engine.logits -= 2.0 * 0.01 ** (number / PHASES) * gradient
    return engine.policies


def rewarded(rollouts, kl):
    """With the KL taken off the rewards, where it is to act there."""
    coef = kl["controller"]["coef"] if kl["type"] == "in_reward" else 0.0
    return rollouts._replace(rewards=token_rewards(rollouts.kl("k1"), rollouts.scores, rollouts.response_mask, coef))


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
    return learn(
        lambda rollouts: critic.advantages(settings, rewarded(rollouts, kl)),
        lambda _, advantages, __: PpoLoss(settings, advantages, advantages, BETA).of_policy,
    )


def without_critic(kl, advantages, group_size, loss=DEFAULT_LOSS):
    """By an entry of train_grpo."""
    sizes = {"samples_per_prompt": group_size, "max_new_tokens": 1, "minibatch_size": 1}
    settings = settings_of("train_grpo", TrainGrpo, "grpo", kl=kl, advantages=advantages, loss=loss, **sizes)
    estimate = ADVANTAGES[settings.advantages.type]

    def advantages_of(rollouts):
        rollouts = rewarded(rollouts, kl)
        of_seeds = [estimate(part, settings.advantages) for part in seed_by_seed(rollouts)]
        return rollouts, torch.cat(of_seeds)

    return learn(advantages_of, partial(step_loss, settings, BETA), group_size)


def test_the_optima_are_those_of_all_policies():
    for optimum, forward, known in (
        (of_reverse_kl, False, (0.529, 0.292, 0.179)),
        (of_forward_kl, True, (0.566, 0.222, 0.213)),
    ):
        assert optimum(BETA).sum() == pytest.approx(1, abs=1e-9)
        assert optimum(BETA).tolist() == pytest.approx(known, abs=6e-4)
        assert optimum(BETA).tolist() == pytest.approx(enumerated(BETA, forward=forward).tolist(), abs=2e-3)
    beta = BETA * 8 / 7
    assert of_reverse_kl(beta).tolist() == pytest.approx((0.486, 0.304, 0.211), abs=6e-4)
    assert of_forward_kl(beta).tolist() == pytest.approx((0.526, 0.239, 0.235), abs=6e-4)


@pytest.mark.parametrize(("kl", "optimum"), PLAIN)
def test_ppo(kl, optimum):
    assert total_variation(by_ppo(kl), optimum(BETA)).max() < 0.02


@pytest.mark.parametrize(("kl", "optimum"), PLAIN)
def test_rloo(kl, optimum):
    policies = without_critic(kl, block(LeaveOneOut), group_size=8)
    assert total_variation(policies, optimum(BETA)).max() < 0.02


@pytest.mark.parametrize(("kl", "optimum"), PLAIN)
def test_reinforce_plus_plus(kl, optimum):
    policies = without_critic(kl, block(Reinforce, scale="none"), group_size=1)
    assert total_variation(policies, optimum(BETA)).max() < 0.02


@pytest.mark.parametrize("group_size", [8, 64])
@pytest.mark.parametrize(("kl", "optimum"), PLAIN)
def test_grpo(kl, optimum, group_size):
    """At 64 samples what the mean takes away is below what is told apart here."""
    beta = BETA * 8 / 7 if group_size == 8 and kl["type"] == "in_loss" else BETA
    policies = without_critic(kl, block(GroupRelative, scale="none"), group_size)
    assert total_variation(policies, optimum(beta)).max() < 0.02


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_steered_coefficient_in_the_loss_holds_its_target(estimator):
    """Of one seed, whose KL the controller reads phase by phase: it ends where that of the policy is the target."""
    kl = block(KlInLoss, estimator=estimator, controller=block(AdaptiveKl, coef=2.0, target=0.1, horizon=2.0 * BATCH))
    settings = settings_of("train_ppo", TrainPpo, "ppo", kl=kl)
    controller = new_controller(settings.kl)

    def advantages_of(rollouts):
        controller.update(float(rollouts.kl("k1").mean()), BATCH)
        return rollouts, rollouts.scores[:, None] - 0.5

    policies = learn(
        advantages_of, lambda _, advantages, __: PpoLoss(settings, advantages, advantages, controller.coef).of_policy
    )
    held = (policies * (policies.log() - START.log())).sum(dim=1)
    assert controller.coef != 2.0
    assert held.tolist() == pytest.approx([0.1] * len(SEEDS), abs=0.02)


@pytest.mark.parametrize("loss", PolicyLoss.__args__[0].__args__, ids=lambda loss: loss.__name__)
def test_every_loss_ends_where_the_reward_less_its_kl_is_the_same_for_all_arms(loss):
    policies = without_critic(IN_REWARD, block(LeaveOneOut), 8, block(loss))
    assert total_variation(policies, of_reverse_kl(BETA)).max() < 0.02


@pytest.mark.parametrize("kl", [IN_REWARD, K2_IN_LOSS, K3_IN_LOSS], ids=lambda kl: kl["type"])
def test_the_first_minibatch_is_on_policy_and_the_second_is_clipped(kl):
    of_ppo = settings_of("train_ppo", TrainPpo, "ppo", kl=kl)
    of_grpo = partial(step_loss, settings_of("train_grpo", TrainGrpo, "grpo", kl=kl), BETA)
    for of_step in (lambda _, advantages, __: PpoLoss(of_ppo, advantages, advantages, BETA).of_policy, of_grpo):
        engine = Engine()
        phase = sampled(engine, [torch.Generator().manual_seed(seed) for seed in SEEDS], 8)
        assert phase.rollouts.kl("k1").count_nonzero() == 0  # the policy is the reference still
        first, second = phase.passes(engine, 2)
        advantages = phase.rollouts.scores[:, None] - 0.5
        sums = of_step(phase.rollouts, advantages, first.rows)(phase.rollouts, first)
        assert (sums["clipfrac"], sums["approxkl"], sums.get("kl", 0.0)) == (0, 0, 0)
        assert sums["loss"].item() == pytest.approx(-advantages[first.rows].sum().item(), rel=1e-12)
        (gradient,) = torch.autograd.grad(sums["loss"], engine.logits)
        with torch.no_grad():
            engine.logits -= gradient / 20
        sums = of_step(phase.rollouts, advantages, second.rows)(phase.rollouts, second)
        assert 0 < sums["clipfrac"] < len(second.rows)
        assert sums["approxkl"] > 0
