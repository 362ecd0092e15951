"""The reward model's scores, against the model on each sequence alone, and rewards that say nothing."""

import pytest
import torch

from stages.lib.command.errors import StageError
from stages.lib.models.scalar_scores import SequenceScores
from stages.lib.rl.rewards.reward_model import RewardModel
from stages.lib.rl.rewards.scoring import scores_of
from tests.lib.rl.test_rollouts import EPISODES, PROMPTS, RESPONSES
from tests.tiny_models import batching, tiny_classifier


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("budget", [6, 1000])
def test_every_response_gets_its_own_score(budget: int, packing: bool) -> None:
    model = tiny_classifier(4)
    scores = RewardModel(SequenceScores(model), batching(budget, packing))(EPISODES)
    with torch.no_grad():
        alone = [float(model(torch.tensor([p + r])).logits) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert scores == pytest.approx(alone, abs=1e-5)
    assert len({*alone}) == 3


def test_a_response_without_a_score_is_an_error() -> None:
    assert scores_of(lambda episodes: [float(episode.prompt.row) for episode in episodes], EPISODES) == [10, 11, 12]
    with pytest.raises(StageError, match=r"row 11 of the prompts, response 'text 1': the reward gives no score to it"):
        scores_of(lambda _: [1.0, None, 2.0], EPISODES)
