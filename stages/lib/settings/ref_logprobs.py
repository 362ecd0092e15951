"""Sections `ref_logprobs` and `ref_logprobs_unpaired` of params.yaml: log-probs of a reference, computed once."""

from stages.lib.settings.bounds import Precision, Text
from stages.lib.settings.declaration import key
from stages.lib.settings.lora import BaseQuantization
from stages.lib.settings.training_tokens import TrainingTokens


class ReferenceSettings(TrainingTokens):
    """A reference model, and in which numbers it computes."""

    model: Text = key("models/sft", "folder of the reference model")
    precision: Precision = key(
        "fp32", "as that of a train_dpo that starts from this model, or its first margin is not 0"
    )
    base_quantization: BaseQuantization = key(None, "as lora.base_quantization of such a train_dpo")


class RefLogprobs(ReferenceSettings):
    """Log-probs of the pairs under a reference model, which train_dpo reads."""

    per_token: bool = key(False, "also keep the log-prob of each token, which some losses need")


class RefLogprobsUnpaired(ReferenceSettings):
    """Log-probs of the unpaired replies under a reference model, which train_unpaired reads."""

    mismatched: bool = key(True, "also of the replies to other prompts, which kto needs; false: in half the time")
