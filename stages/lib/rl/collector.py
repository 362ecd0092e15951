"""One phase of rollouts: responses to prompts, their scores, and what the models say of their tokens."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from stages.lib.compute.batching import MicroBatching
from stages.lib.data.prompts import Prompt
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rewards.mixture import Mixture
from stages.lib.rl.rewards.reward_metrics import with_parts
from stages.lib.rl.rewards.scoring import Reward, ScoredEpisodes, scores_of
from stages.lib.rl.rollouts import Rollouts, read_rollouts
from stages.lib.rl.samplers.asynchronous import AsynchronousSampler
from stages.lib.rl.samplers.sampler import Sampler
from stages.lib.rl.trained_policy import TrainedPolicy


class Collector(NamedTuple):
    """What rollouts are made with; `critic` gives a value at each token, or is None."""

    sampler: Sampler
    reward: Reward
    policy: TrainedPolicy
    critic: Callable | None
    batching: MicroBatching

    @property
    def reward_weights(self) -> dict[str, float]:
        """Of the parts of the reward, by name."""
        parts = self.reward.by_name if isinstance(self.reward, Mixture) else {}
        return {name: part.weight for name, part in parts.items()}

    def collect(self, prompts: Sequence[Prompt], phase: int, samples_per_prompt: int = 1) -> Rollouts:
        """Responses from the policy as it is, in a phase (0-based). Nothing that a checkpoint holds changes in it."""
        episodes = self.sample(prompts, phase, samples_per_prompt)
        return self.read(episodes, self.scored(episodes))

    def sample(self, prompts: Sequence[Prompt], step: int, samples_per_prompt: int) -> list[Episode]:
        """Responses from the policy as it is, as `Sampler.sample` says."""
        self.sampler.take_weights()
        return self.sampler.sample(prompts, step, samples_per_prompt)

    def read(self, episodes: list[Episode], scored: ScoredEpisodes) -> Rollouts:
        """What the models say of episodes."""
        engine, reference = self.policy.engine, self.policy.reference
        temperature = self.sampler.temperature
        rollouts = read_rollouts(episodes, scored.totals, engine, reference, self.critic, temperature, self.batching)
        if isinstance(self.sampler, AsynchronousSampler):
            rollouts = rollouts._replace(staleness=self.sampler.staleness)
        return with_parts(rollouts, scored.parts)

    def scored(self, episodes: Sequence[Episode]) -> ScoredEpisodes:
        """The rewards of the episodes. Raises StageError if one has none."""
        if isinstance(self.reward, Mixture):
            return self.reward.scored(episodes)
        return ScoredEpisodes(scores_of(self.reward, episodes))
