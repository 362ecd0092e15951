"""Section `evaluate_rm` of params.yaml: which reward models are measured on test pairs."""

from stages.lib.settings.bounds import Precision, Text
from stages.lib.settings.declaration import Settings, key
from stages.lib.settings.prepare_base import ModelName


class EvaluateRm(Settings):
    """Accuracy and calibration of reward models on the test pairs."""

    reward_models: dict[ModelName, Text] = key({"rm": "models/rm"}, "name of each reward model to evaluate: its folder")
    precision: Precision = key("fp32", "of weights and activations")
