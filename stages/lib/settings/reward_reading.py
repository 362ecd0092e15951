"""How a reward model is read, where that is not plain from its folder: which head, and which of its labels."""

from stages.lib.settings.bounds import Text, WholeNumber
from stages.lib.settings.declaration import Settings, key


class RewardReading(Settings):
    """What each section that names a reward model says of it."""

    reward_head: Text | None = key(
        None,
        "of the reward model: the layer that gives the score, such as score, classifier, v_head.summary or value_head; "
        "null: the one that is found in its folder",
    )
    reward_label: Text | WholeNumber | None = key(
        None, "of a reward model with several labels: the one whose logit is the reward, by name or number; else null"
    )


class RewardSettings(RewardReading):
    """What each section says besides in which the scores are rewards, or compare policies."""

    standardise_reward: bool = key(
        False,
        "the reward is (score − mean) / standard deviation, of the scores of validation rows that train_rm has left in "
        "the reward model's config.json",
    )
