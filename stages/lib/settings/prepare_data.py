"""Section `prepare_data` of params.yaml; the file explains each key."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from stages.lib.formats import Format

Kind = Literal["sft", "preference", "prompts"]
NO_FILE = "data/raw/none"
MOST_ROWS = 100_000  # far below the number of distinct prompts (eval: about 250 000), so drawing new ones stays quick


@dataclass(frozen=True)
class FilmReviewSettings:
    """How many rows to generate and how noisy the preference labels are.

    Attributes:
        sft_rows, preference_rows, prompt_rows: rows of the train split of each kind.
        eval_rows: rows of the eval split of every kind.
        label_temperature: Bradley-Terry temperature in units of gold utility; larger means noisier labels.
    """

    sft_rows: int
    preference_rows: int
    prompt_rows: int
    eval_rows: int
    label_temperature: float

    def __post_init__(self) -> None:
        for name in ("sft_rows", "preference_rows", "prompt_rows", "eval_rows"):
            if not 1 <= getattr(self, name) <= MOST_ROWS:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 to {MOST_ROWS}")
        if not (math.isfinite(self.label_temperature) and self.label_temperature > 0):
            raise ValueError(f"label_temperature is {self.label_temperature}: expected a number above 0")


@dataclass(frozen=True)
class PrepareData:
    """The section `prepare_data`; params.yaml explains each key."""

    source: Literal["film_reviews", "local", "hub"]
    path: str
    hub_dataset: str | None
    hub_revision: str | None
    hub_data_dir: str | None
    hub_split: str | None
    format: Literal["auto", Format]
    columns: dict[str, str]
    kinds: tuple[Kind, ...]
    max_rows: int | None
    eval_fraction: float
    film_reviews: FilmReviewSettings

    def __post_init__(self) -> None:
        self._check_source()
        if self.source == "film_reviews" and (self.format != "auto" or self.columns or self.max_rows is not None):
            raise ValueError("format, columns and max_rows are for raw data: with source film_reviews leave them unset")
        if len(set(self.columns.values())) < len(self.columns):
            raise ValueError("columns gives two columns the same name")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError("kinds must name at least one kind, and each once")
        if self.max_rows is not None and self.max_rows < 2:
            raise ValueError(f"max_rows must be at least 2, found {self.max_rows}; null for all rows")
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be above 0 and below 1, found {self.eval_fraction}")

    def _check_source(self) -> None:
        """Each source has its own keys; a key of another one would be a setting that nothing obeys."""
        if (self.source == "local") != (self.path != NO_FILE):
            raise ValueError(
                f"path must be a file or folder with source local, and {NO_FILE} with any other: "
                f"found {self.path} with source {self.source}"
            )
        hub_keys = ("hub_dataset", "hub_revision", "hub_data_dir", "hub_split")
        set_keys = [key for key in hub_keys if getattr(self, key) is not None]
        if self.source != "hub" and set_keys:
            raise ValueError(f"{set_keys[0]} must be null with source {self.source}: it is for source hub")
        if self.source == "hub" and self.hub_dataset is None:
            raise ValueError("hub_dataset must name a data set (owner/name) with source hub")
        if self.source == "hub" and not re.fullmatch("[0-9a-f]{40}", self.hub_revision or ""):
            raise ValueError(
                f"hub_revision must be a full commit hash of 40 hexadecimal digits, found {self.hub_revision!r}: "
                "a branch or tag may change under the same name"
            )
