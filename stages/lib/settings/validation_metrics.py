"""What an evaluation on validation rows measures in the stages that pass over a table, by name.

The objectives compute these (`stages/lib/objectives`), which load torch; a wrong name is to be refused before that.
"""

from stages.lib.settings.epochs import EpochSettings
from stages.lib.settings.preference_loss import (
    MixtureLoss,
    PreferenceLoss,
    has_exponents,
    is_weighted,
    weighted_losses,
)
from stages.lib.settings.reward_loss import PairwiseLoss, RewardLoss
from stages.lib.settings.train_dpo import TrainDpo
from stages.lib.settings.train_rm import TrainRm
from stages.lib.settings.train_unpaired import TrainUnpaired
from stages.lib.settings.unpaired_loss import BcoLoss, KtoLoss, UnpairedLoss

OF_TEXTS = ("loss", "perplexity", "entropy", "token_accuracy")
OF_POLICIES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
OF_POLICIES += ("logits/chosen", "logits/rejected", "entropy")
OF_PAIRWISE_REWARDS = ("accuracy", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/squares")
OF_REGRESSION = ("rewards/mean", "rewards/squares", "scores/mean", "scores/squares", "scores/products")
OF_ROUTERS = ("router_loss", "most_loaded_expert")


def validation_metrics(settings: EpochSettings) -> set[str]:
    """The metrics of an entry of train_sft, train_rm, train_dpo or train_unpaired."""
    if isinstance(settings, TrainDpo):
        found = of_preference_loss(settings.loss)
    elif isinstance(settings, TrainUnpaired):
        found = of_unpaired_loss(settings.loss)
    elif isinstance(settings, TrainRm):
        found = of_reward_loss(settings.loss)
    else:
        found = {*OF_TEXTS}
    return found | {*(OF_ROUTERS if settings.router_loss else ())}


def of_preference_loss(loss: PreferenceLoss) -> set[str]:
    parts = weighted_losses(loss)
    found = {"loss", *OF_POLICIES, "rewards/accuracies"}
    found |= {f"loss/{name}" for name in parts} if isinstance(loss, MixtureLoss) else set()
    found |= {"exponents/clamped"} if any(has_exponents(part.loss) for part in parts.values()) else set()
    return found | ({"wpo/weight"} if any(is_weighted(part.loss) for part in parts.values()) else set())


def of_unpaired_loss(loss: UnpairedLoss) -> set[str]:
    own = {"kl"} if isinstance(loss, KtoLoss) else {"delta"} if isinstance(loss, BcoLoss) else set()
    return {"loss", *OF_POLICIES} | own


def of_reward_loss(loss: RewardLoss) -> set[str]:
    return {"loss", *(OF_PAIRWISE_REWARDS if isinstance(loss, PairwiseLoss) else OF_REGRESSION)}
