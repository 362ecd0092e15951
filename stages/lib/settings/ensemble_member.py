"""Section `ensemble_member` of params.yaml: reward models that score together."""

from stages.lib.settings.bounds import Name, NotNegative, Text
from stages.lib.settings.declaration import key
from stages.lib.settings.reward_reading import RewardSettings


class EnsembleMember(RewardSettings):
    """One of the reward models whose scores, each times its weight, add up to the score of an ensemble."""

    ensemble: Name = key("judges", "name of the ensemble; an entry names it by its folder, data/ensembles/<name>")
    reward_model: Text = key("models/rm", "folder of the reward model")
    weight: NotNegative = key(1.0, "of its score in the sum")
