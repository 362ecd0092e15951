"""The groups of responses that a phase trains on; with dynamic sampling those alone whose rewards differ.

Prompts whose responses are all rewarded alike teach nothing (DAPO, arXiv 2503.14476, section 3.2). They are left out,
and as many further prompts are asked, for a limited number of rounds. What was kept is kept: a phase that is not full
then trains on what it has.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from stages.lib.data.mapped_table import MappedTable
from stages.lib.rl.advantages import without_variance
from stages.lib.rl.collector import Collector
from stages.lib.rl.episodes import Episode
from stages.lib.rl.prompt_table import prompts_from
from stages.lib.rl.rewards.reward_metrics import failures_of
from stages.lib.rl.rewards.scoring import ScoredEpisodes
from stages.lib.rl.rollouts import Rollouts
from stages.lib.rl.score_normalisation import shape_scores
from stages.lib.settings.dynamic_sampling import DynamicSampling
from stages.lib.settings.train_grpo import TrainGrpo


class PhaseGroups(NamedTuple):
    """Rollouts of the groups that were kept; of all, if none was, and then nothing is learnt from them."""

    rollouts: Rollouts
    asked: int  # prompts
    kept: int  # of them
    metrics: dict[str, float]


class GroupSampling:
    """Samples the groups of one phase after the other; a checkpoint holds how far it has come in the prompts.

    Args:
        prompts: of a token table, asked pass after pass.
    """

    def __init__(self, settings: TrainGrpo, prompts: MappedTable, collector: Collector, seed: int) -> None:
        self.settings = settings
        self.prompts = prompts
        self.collector = collector
        self.seed = seed
        self.asked = 0
        self.kept = 0

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked, "kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked, self.kept = state["asked"], state["kept"]

    def count(self, phase: PhaseGroups) -> None:
        """Go on behind the prompts of a phase, when its updates are about to begin."""
        self.asked += phase.asked
        self.kept += phase.kept

    def results(self) -> dict[str, float]:
        """Metrics of the whole run."""
        if self.settings.dynamic_sampling is None:
            return {}
        return {"prompts_asked": self.asked, "prompts_left_out": self.asked - self.kept}

    def phase(self, iteration: int) -> PhaseGroups:
        """The rollouts of a phase (0-based). Nothing that a checkpoint holds changes in it.

        Each round has random numbers of its own, those of (phase, round).
        """
        settings, filtering = self.settings, self.settings.dynamic_sampling
        size, rounds = settings.samples_per_prompt, 1 + (filtering.refill_rounds if filtering else 0)
        episodes: list[Episode] = []
        scored, rewards, kept = ScoredEpisodes([], {}), torch.zeros(0, size), torch.zeros(0, dtype=torch.bool)
        asked = used = 0
        while used < rounds and (missing := settings.rollout_batch_size - int(kept.sum())):
            prompts = prompts_from(self.prompts, self.asked + asked, missing, self.seed)
            new = self.collector.sample(prompts, iteration * rounds + used, size)
            scores = self.collector.scored(new)
            ended = torch.tensor([episode.ended for episode in new])
            shaped = shape_scores(
                torch.tensor(scores.totals), ended, clip=settings.score_clip, truncated=settings.truncated
            )
            groups = shaped.reshape(-1, size)
            episodes, scored = episodes + new, joined(scored, scores)
            rewards, kept = torch.cat([rewards, groups]), torch.cat([kept, teaches(groups, filtering)])
            asked, used = asked + missing, used + 1
        count = int(kept.sum())
        rows = [row for row in range(len(episodes)) if not count or kept[row // size]]
        rollouts = self.collector.read([episodes[row] for row in rows], scores_of_rows(scored, rows))
        rollouts = rollouts._replace(failures=failures_of(scored.parts))  # of the groups that were left out, too
        metrics = sampling_metrics(filtering, asked, count, used, scored.totals, rewards)
        return PhaseGroups(rollouts, asked, count, metrics)


def sampling_metrics(
    filtering: DynamicSampling | None,
    asked: int,
    kept: int,
    rounds: int,
    scores: Sequence[float],
    rewards: torch.Tensor,
) -> dict[str, float]:
    """What the curve says of a phase's sampling; scores and rewards are those of all groups, whether kept or not."""
    if filtering is None:
        return {}
    alike = without_variance(rewards).float().mean()
    values = (asked, kept, rounds, sum(scores) / len(scores), rewards.mean(), alike)
    return {name: float(value) for name, value in zip(GROUP_COLUMNS, values, strict=True)}


COUNTED = ("prompts", "kept", "rounds", "unfiltered_scores", "unfiltered_rewards", "unfiltered_without_variance")
GROUP_COLUMNS = tuple(f"dynamic_sampling/{name}" for name in COUNTED)


def teaches(rewards: torch.Tensor, filtering: DynamicSampling | None) -> torch.Tensor:
    """Which groups are kept: whose rewards differ, with a mean within the bounds. (groups, samples) → (groups,)."""
    mean, kept = rewards.mean(dim=1), ~without_variance(rewards)
    if filtering is None:
        return torch.ones_like(kept)
    if filtering.above is not None:
        kept = kept & (mean > filtering.above)
    return kept if filtering.below is None else kept & (mean < filtering.below)


def joined(one: ScoredEpisodes, other: ScoredEpisodes) -> ScoredEpisodes:
    """The scores of some episodes, then those of others."""
    parts = {name: [*one.parts.get(name, []), *scores] for name, scores in other.parts.items()}
    return ScoredEpisodes(one.totals + other.totals, parts)


def scores_of_rows(scored: ScoredEpisodes, rows: Sequence[int]) -> ScoredEpisodes:
    """The scores of some of the episodes."""
    parts = {name: [scores[row] for row in rows] for name, scores in scored.parts.items()}
    return ScoredEpisodes([scored.totals[row] for row in rows], parts)
