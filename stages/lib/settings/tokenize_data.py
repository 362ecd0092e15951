"""Section `tokenize_data` of params.yaml; the file explains each key."""

from dataclasses import dataclass
from typing import Literal

from stages.lib.settings.bounds import Count


@dataclass(frozen=True)
class Tokenize:
    """Section `tokenize_data` of params.yaml; the file explains each key."""

    max_length: Count
    max_prompt_length: Count
    overlong: Literal["error", "drop"]
    on_unusable_row: Literal["error", "drop"]

    def __post_init__(self) -> None:
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below max_length "
                f"({self.max_length}): a reply needs at least one token"
            )
