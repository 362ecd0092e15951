"""Section `tokenize` of params.yaml; the file explains each key."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Tokenize:
    """Section `tokenize` of params.yaml; the file explains each key."""

    max_length: int
    max_prompt_length: int
    overlong: Literal["error", "drop"]

    def __post_init__(self) -> None:
        if not 0 < self.max_prompt_length < self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be above 0 and below max_length "
                f"({self.max_length}): a reply needs at least one token"
            )
