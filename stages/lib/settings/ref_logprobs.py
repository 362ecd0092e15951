"""Section `ref_logprobs` of params.yaml; the file explains each key."""

from dataclasses import dataclass
from typing import Literal

from stages.lib.settings.lora import BaseQuantization


@dataclass(frozen=True)
class RefLogprobs:
    """Section `ref_logprobs` of params.yaml; the file explains each key."""

    precision: Literal["fp32", "bf16"]
    base_quantization: BaseQuantization
