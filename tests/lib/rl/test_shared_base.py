"""One body, two readings: what was frozen stays what it was while the other is trained."""

from pathlib import Path

import torch
from torch import nn

from stages.lib.models.lora import Lora
from stages.lib.rl.shared_base import FirstHead, WithoutAdapters
from stages.lib.settings.declaration import block
from stages.lib.settings.lora import LoraSettings
from tests.tiny_models import tiny_classifier

IDS = torch.randint(3, 23, (2, 6), generator=torch.Generator().manual_seed(4))


class LastScore(nn.Module):
    """What a reward model does with a classifier's parts."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.classifier.score(self.classifier.base_model(input_ids=ids).last_hidden_state[:, -1])


def test_a_reward_model_does_not_learn_with_its_critic() -> None:
    first = LastScore(tiny_classifier())(IDS)
    critic = tiny_classifier()
    lora = Lora(critic, LoraSettings(**block(LoraSettings, rank=2, alpha=4)), 0, Path("models/rm"))
    reward_model = WithoutAdapters(LastScore(FirstHead(critic)), lora)
    assert torch.equal(reward_model(IDS), first)
    with torch.no_grad():
        for name in lora.trained_names:
            critic.get_parameter(name).add_(0.1)
    assert not torch.allclose(LastScore(critic)(IDS), first, atol=1e-2)
    scores = reward_model(IDS)
    assert torch.equal(scores, first)
    assert not scores.requires_grad
    shared = {id(weight) for weight in critic.parameters()}
    own = [name for name, weight in reward_model.module.named_parameters() if id(weight) not in shared]
    assert own == ["classifier.score.weight"]
