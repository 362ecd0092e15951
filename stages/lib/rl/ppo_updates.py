"""What a phase of PPO is made with, and its updates of policy and critic."""

from typing import Any, NamedTuple

from stages.lib.compute.engine.base import Engine
from stages.lib.models.policy_with_values import PolicyWithValues
from stages.lib.rl.collector import Collector
from stages.lib.rl.early_stop import EarlyStop
from stages.lib.rl.entropy_bonus import EntropyCoefficient
from stages.lib.rl.kl_control import AdaptiveKLController, FixedKLController
from stages.lib.rl.learner import Learner, mean_of_each, means_of_updates, minibatches
from stages.lib.rl.ppo_loss import PpoLoss
from stages.lib.rl.ptx import Ptx
from stages.lib.rl.published_critic import PublishedCritic
from stages.lib.rl.reference_reset import ResetReference
from stages.lib.rl.rollouts import Rollouts
from stages.lib.rl.samplers.asynchronous import state_of
from stages.lib.rl.score_normalisation import RunningMoments
from stages.lib.rl.step_back import KlLimit, LimitedUpdates
from stages.lib.settings.train_ppo import TrainPpo


class Parts(NamedTuple):
    """What a phase is made with."""

    policy: Engine
    critic: Engine | None  # None: the policy has a value head
    collector: Collector
    moments: RunningMoments
    kl_controller: AdaptiveKLController | FixedKLController
    entropy: EntropyCoefficient
    reference: ResetReference
    early_stop: EarlyStop
    kl_limit: KlLimit
    ptx: Ptx | None
    published_critic: PublishedCritic | None

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: each part with state_dict() and load_state_dict()."""
        budgets = {"sampling": self.collector.sampler.budget, "budget": self.collector.batching.budget}
        parts = {name: part for name, part in self._asdict().items() if hasattr(part, "state_dict")}
        return parts | budgets | state_of(self.collector.sampler)


def plan_learning_rates(settings: TrainPpo, parts: Parts, iteration: int) -> dict[str, float]:
    """Let both end with the last phase, however many updates there have been. Returns those of the first updates."""
    updates, warmup = settings.updates_per_iteration, settings.critic_warmup_iterations
    first = iteration if parts.critic is None else max(iteration, warmup)
    parts.policy.expect((settings.iterations - first) * updates)
    rates = {"learning_rate": parts.policy.learning_rate}
    if parts.critic is not None:
        parts.critic.expect((settings.iterations - iteration) * updates)
        rates["value/learning_rate"] = parts.critic.learning_rate
    return rates


def learners(parts: Parts, rollouts: Rollouts, loss: PpoLoss, *, warms_up: bool) -> tuple[Learner, Learner | None]:
    """Of policy and critic; where these share a body, one of both."""
    of_policy = ("policy", parts.policy, parts.collector.batching, rollouts)
    beside = parts.ptx.backward if parts.ptx else None
    if parts.critic is None:
        body = parts.policy.module
        assert isinstance(body, PolicyWithValues)
        body.body_learns_values = not warms_up
        return Learner(*of_policy, *((loss.of_head, None) if warms_up else (loss.of_both, beside))), None
    critic = Learner("value", parts.critic, parts.collector.batching, rollouts, loss.of_values)
    return Learner(*of_policy, loss.of_policy, beside), critic


def update(settings: TrainPpo, seed: int, iteration: int, policy: Learner, critic: Learner | None) -> dict[str, float]:
    """Every minibatch of a phase. Returns means over them."""
    learns = iteration >= settings.critic_warmup_iterations
    batches = [*minibatches(len(policy.rollouts.episodes), settings, seed, iteration)]
    of_policy, of_critic = LimitedUpdates(policy, settings.max_policy_kl), []
    for rows in batches:
        if learns or critic is None:
            of_policy.update(rows)
        if critic is not None:
            of_critic.append(critic.update(rows))
    of_policy.check(batches[0])
    updates = float(len(of_policy.found) if learns else 0)
    return means_of_updates(of_policy.found) | mean_of_each(of_critic) | {"policy/updates": updates}
