"""Which groups a phase trains on, which prompts it asks for them, and what it says of that."""

from collections.abc import Sequence
from typing import Any, cast

import pyarrow as pa
import pytest
import torch

from stages.lib.data.mapped_table import MappedTable
from stages.lib.data.token_tables import PROMPT_SCHEMA
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.collector import Collector
from stages.lib.rl.dynamic_sampling import GroupSampling, teaches
from stages.lib.rl.episodes import Episode
from stages.lib.rl.prompt_table import prompts_of_phase
from stages.lib.rl.rewards.mixture import Mixture, MixturePart
from stages.lib.rl.rewards.reward_metrics import reward_metrics
from stages.lib.rl.rewards.scoring import Failure, RewardScore
from stages.lib.rl.trained_policy import TrainedPolicy
from stages.lib.settings.declaration import block
from stages.lib.settings.dynamic_sampling import DynamicSampling
from stages.lib.settings.train_grpo import TrainGrpo
from stages.lib.settings.truncated import MissingEos
from tests.lib.rl.samplers.test_own import sampler
from tests.tiny_models import batching, tiny_llama

ROWS, SEED = 10, 3


def prompts() -> MappedTable:
    cells = {"messages": "[]", "facts": "{}", "context": "{}", "source": "a"}
    rows = [{"row": row, "prompt_ids": [3 + row], **cells} for row in range(ROWS)]
    return MappedTable(pa.Table.from_pylist(rows, PROMPT_SCHEMA))


def odd_rows_differ(episodes: Sequence[Episode]) -> list[float | None]:
    """Of an even row all responses get 1; of an odd one the first gets the row, the others 0."""
    return [
        float(episode.prompt.row * (episode.sample == 0)) if episode.prompt.row % 2 else 1.0 for episode in episodes
    ]


def group_sampling(
    filtering: dict[str, Any] | None, reward: Any = odd_rows_differ, size: int = 4, score_clip: float | None = None
) -> GroupSampling:
    settings = {"rollout_batch_size": size, "samples_per_prompt": 2, "minibatch_size": 4, "dynamic_sampling": filtering}
    entry = TrainGrpo.model_validate(
        block(TrainGrpo, **settings, score_clip=score_clip, truncated=block(MissingEos, penalty=0.0))
    )
    model = tiny_llama()
    policy = TrainedPolicy(model, cast(Any, None), cast(Any, TokenLogProbs(model, with_entropies=True)), None)
    collector = Collector(sampler(model, max_new_tokens=3, by_row=False), reward, policy, None, batching(1000))
    return GroupSampling(entry, prompts(), collector, SEED)


def asked_rows(count: int) -> list[int]:
    """The rows of the first prompts that are asked."""
    one_by_one = TrainGrpo.model_validate(block(TrainGrpo, iterations=count, rollout_batch_size=1, minibatch_size=4))
    return [prompts_of_phase(prompts(), place, one_by_one, SEED)[0].row for place in range(count)]


def test_without_it_the_phases_have_the_prompts_of_their_places() -> None:
    sampling = group_sampling(None)
    found = []
    for iteration in range(4):  # 16 of 10 prompts: the second pass begins in the third phase
        phase = sampling.phase(iteration)
        assert (phase.asked, phase.kept, phase.metrics) == (4, 4, {})
        found += [episode.prompt.row for episode in phase.rollouts.episodes[::2]]
        sampling.count(phase)
    assert found == asked_rows(16)
    assert sampling.results() == {}


def test_groups_that_are_alike_are_replaced_and_what_was_kept_stays() -> None:
    sampling = group_sampling({"refill_rounds": 5, "above": None, "below": None})
    phase = sampling.phase(0)
    odd = [row for row in asked_rows(phase.asked) if row % 2]
    assert [episode.prompt.row for episode in phase.rollouts.episodes[::2]] == odd
    assert (len(odd), phase.kept) == (4, 4)
    assert phase.asked > 4
    everything = [(row if row % 2 else 2) / 2 for row in asked_rows(phase.asked)]
    assert phase.metrics["dynamic_sampling/prompts"] == phase.asked
    assert phase.metrics["dynamic_sampling/kept"] == 4
    for what in ("scores", "rewards"):
        mean = phase.metrics[f"dynamic_sampling/unfiltered_{what}"]
        assert mean == pytest.approx(sum(everything) / len(everything))
    share = phase.metrics["dynamic_sampling/unfiltered_without_variance"]
    assert share == pytest.approx(1 - 4 / phase.asked)
    assert phase.rollouts.scores.tolist() == [score for row in odd for score in (row, 0)]
    sampling.count(phase)
    assert sampling.phase(1).rollouts.episodes[0].prompt.row == [row for row in asked_rows(20) if row % 2][4]
    assert sampling.results() == {"prompts_asked": phase.asked, "prompts_left_out": phase.asked - 4}


def test_failures_are_counted_in_groups_that_are_left_out_too() -> None:
    """Where no response of an even row can be judged, all of its group get 0, and teach nothing."""

    def reward(episodes: Sequence[Episode]) -> list[RewardScore]:
        given = zip(episodes, odd_rows_differ(episodes), strict=True)
        return [score if episode.prompt.row % 2 else Failure("timeout", "late") for episode, score in given]

    sampling = group_sampling(
        {"refill_rounds": 5, "above": None, "below": None}, Mixture({"own": MixturePart(reward, missing="skip")})
    )
    phase = sampling.phase(0)
    assert phase.kept == 4 < phase.asked
    assert reward_metrics(phase.rollouts)["reward_timeouts/own"] == 2 * (phase.asked - phase.kept)


def test_when_the_rounds_are_over_a_phase_has_what_there_is() -> None:
    phase = group_sampling({"refill_rounds": 0, "above": None, "below": None}).phase(0)
    odd = [row for row in asked_rows(4) if row % 2]
    assert 0 < len(odd) < 4
    assert (phase.asked, phase.kept, phase.metrics["dynamic_sampling/rounds"]) == (4, len(odd), 1)
    assert [episode.prompt.row for episode in phase.rollouts.episodes[::2]] == odd


def test_where_no_group_is_kept_the_rollouts_are_all_of_them() -> None:
    filtering = {"refill_rounds": 1, "above": None, "below": None}
    phase = group_sampling(filtering, lambda episodes: [0.5] * len(episodes)).phase(0)
    assert (phase.asked, phase.kept, len(phase.rollouts.episodes)) == (8, 0, 16)


def test_scores_that_are_alike_where_they_are_clipped_teach_nothing() -> None:
    filtering = {"refill_rounds": 0, "above": None, "below": None}
    phase = group_sampling(filtering, lambda episodes: [2.0 + episode.sample for episode in episodes], score_clip=1.0)
    metrics = phase.phase(0).metrics
    assert metrics["dynamic_sampling/kept"] == 0
    assert metrics["dynamic_sampling/unfiltered_rewards"] == 1
    assert metrics["dynamic_sampling/unfiltered_scores"] == 2.5


def test_rounds_and_phases_have_random_numbers_of_their_own() -> None:
    """Of one prompt, which is asked again and again at the same places."""
    filtering = {"refill_rounds": 1, "above": None, "below": None}
    sampling = group_sampling(filtering, lambda episodes: [0.5] * len(episodes))
    sampling.prompts = MappedTable(sampling.prompts.data.take([0] * ROWS))
    found = [[episode.ids for episode in sampling.phase(iteration).rollouts.episodes] for iteration in range(2)]
    by_round = [phase[start : start + 8] for phase in found for start in (0, 8)]
    for one in range(4):
        for other in range(one):
            assert by_round[one] != by_round[other]


def test_bounds_are_of_the_mean_reward() -> None:
    rewards = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 0.7]])
    filtering = DynamicSampling(refill_rounds=1, above=None, below=None)
    assert teaches(rewards, filtering).tolist() == [False, True, False, True]
    assert teaches(rewards, filtering.model_copy(update={"above": 0.5})).tolist() == [False, False, False, True]
    assert teaches(rewards, filtering.model_copy(update={"below": 0.55})).tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match=r"above \(0.5\) must be less than below \(0.5\)"):
        DynamicSampling(refill_rounds=1, above=0.5, below=0.5)
