"""Section `ref_logprobs` of params.yaml: log-probs of the reference, computed once."""

from stages.lib.settings.bounds import Precision
from stages.lib.settings.declaration import Settings, key
from stages.lib.settings.lora import BaseQuantization


class RefLogprobs(Settings):
    """Log-probs of the pairs under the SFT policy, which train_dpo reads."""

    precision: Precision = key("fp32", "as train_dpo's, or the first step's margin is not 0")
    base_quantization: BaseQuantization = key(None, "as train_dpo.lora.base_quantization")
