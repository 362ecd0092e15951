"""Section `evaluate_rm` of params.yaml: reward models that are measured on test pairs, by name."""

from stages.lib.settings.bounds import Precision, Text
from stages.lib.settings.declaration import key
from stages.lib.settings.reward_reading import RewardReading


class EvaluateRm(RewardReading):
    """Accuracy and calibration of a reward model on the test pairs."""

    reward_model: Text = key("models/rm", "folder of the reward model")
    precision: Precision = key("fp32", "of weights and activations")
