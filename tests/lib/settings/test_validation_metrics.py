"""The metrics that settings know by name are those that the objectives compute."""

from typing import Any

import pytest

from stages.lib.objectives import reward, router_loss, sft
from stages.lib.objectives.preference import metrics_of_loss
from stages.lib.objectives.unpaired import metrics_of_replies
from stages.lib.settings import preference_loss as of
from stages.lib.settings import unpaired_loss as of_replies
from stages.lib.settings.declaration import block
from stages.lib.settings.divergence import AlphaDivergence, ForwardKl, JensenShannon
from stages.lib.settings.reward_loss import RegressionLoss
from stages.lib.settings.router_loss import RouterLoss
from stages.lib.settings.train_dpo import TrainDpo
from stages.lib.settings.train_rm import TrainRm
from stages.lib.settings.train_sft import TrainSft
from stages.lib.settings.train_unpaired import TrainUnpaired
from stages.lib.settings.validation_metrics import validation_metrics

PARTS = {"first": block(of.WeightedLoss, loss=block(of.DiscopopLoss, wpo=True)), "second": block(of.WeightedLoss)}


def built(of_kind: Any, **changed: Any) -> Any:
    return of_kind.model_validate(block(of_kind, **changed))


def test_of_texts_and_rewards() -> None:
    assert validation_metrics(built(TrainSft)) == {*sft.METRICS}
    routed = built(TrainSft, router_loss=block(RouterLoss))
    assert validation_metrics(routed) == {*sft.METRICS, *router_loss.METRICS}
    assert validation_metrics(built(TrainRm)) == {*reward.OF_PAIRS}
    assert validation_metrics(built(TrainRm, kind="unpaired", loss=block(RegressionLoss))) == {*reward.OF_REPLIES}


@pytest.mark.parametrize(
    "loss",
    [
        block(of.SigmoidLoss),
        block(of.SigmoidLoss, wpo=True, divergence=block(JensenShannon)),
        block(of.IpoLoss, divergence=block(ForwardKl)),
        block(of.HingeLoss, divergence=block(AlphaDivergence)),
        block(of.DiscopopLoss),
        block(of.SimpoLoss),
        block(of.MixtureLoss, parts=PARTS),
    ],
)
def test_of_pairs(loss: dict[str, Any]) -> None:
    settings = built(TrainDpo, loss=loss)
    assert validation_metrics(settings) == {*metrics_of_loss(settings.loss)}


@pytest.mark.parametrize("kind", [of_replies.KtoLoss, of_replies.BcoLoss, of_replies.ApoZeroUnpairedLoss])
def test_of_single_replies(kind: Any) -> None:
    settings = built(TrainUnpaired, loss=block(kind))
    assert validation_metrics(settings) == {*metrics_of_replies(settings.loss)}
