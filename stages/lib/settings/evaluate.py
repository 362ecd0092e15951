"""Section `evaluate` of params.yaml; the file explains each key."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Evaluate:
    """Section `evaluate` of params.yaml; the file explains each key."""

    max_prompts: int | None
    max_new_tokens: int
    temperature: float
    precision: Literal["fp32", "bf16"]
    bootstrap_resamples: int

    def __post_init__(self) -> None:
        if (self.max_prompts is not None and self.max_prompts < 1) or self.max_new_tokens < 1:
            raise ValueError("max_prompts and max_new_tokens must be at least 1")
        if self.temperature < 0 or self.bootstrap_resamples < 100:
            raise ValueError("temperature must not be negative and bootstrap_resamples at least 100")
