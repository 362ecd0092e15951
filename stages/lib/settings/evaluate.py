"""Section `evaluate` of params.yaml; the file explains each key."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from stages.lib.command.params import Seed
from stages.lib.settings.bounds import Count, NewTokens, NotNegative


@dataclass(frozen=True)
class Evaluate:
    """Section `evaluate` of params.yaml; the file explains each key."""

    seed: Seed | None
    max_prompts: Count | None
    max_new_tokens: NewTokens
    temperature: NotNegative
    precision: Literal["fp32", "bf16"]
    bootstrap_resamples: Annotated[int, Ge(100), Le(1_000_000)]

    def __post_init__(self) -> None:
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature must be 0 (greedy) or at least 0.001, found {self.temperature}")
