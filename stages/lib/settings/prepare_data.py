"""Section `prepare_data` of params.yaml; the file explains each key."""

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from stages.lib.data.formats import WITHOUT_PAIRS, Format
from stages.lib.data.prepared_rows import Kind
from stages.lib.data.raw_columns import refuse_unknown_targets
from stages.lib.settings.bounds import Temperature

NO_FILE = "data/raw/none"
HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
# Far below the number of distinct prompts (eval: about 250 000), so drawing new ones stays quick.
GeneratedRows = Annotated[int, Ge(1), Le(100_000)]


@dataclass(frozen=True)
class FilmReviewSettings:
    """How many rows to generate and how noisy the preference labels are.

    Attributes:
        sft_rows, preference_rows, prompt_rows: rows of the train split of each kind.
        eval_rows: rows of the eval split of every kind.
        label_temperature: Bradley-Terry temperature in units of gold utility; larger means noisier labels.
    """

    sft_rows: GeneratedRows
    preference_rows: GeneratedRows
    prompt_rows: GeneratedRows
    eval_rows: GeneratedRows
    label_temperature: Temperature


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
    ignore_columns: tuple[str, ...]
    on_unusable_row: Literal["error", "drop"]
    kinds: tuple[Kind, ...]
    max_rows: Annotated[int, Ge(2)] | None
    eval_fraction: Annotated[float, Gt(0), Lt(1)]
    film_reviews: FilmReviewSettings

    def __post_init__(self) -> None:
        self._check_source()
        self._check_columns()
        if self.source == "film_reviews" and (self.format != "auto" or self.columns or self.max_rows is not None):
            raise ValueError("format, columns and max_rows are for raw data: with source film_reviews leave them unset")
        if self.format in WITHOUT_PAIRS and "preference" in self.kinds:
            raise ValueError(
                f"format {self.format} has no rejected replies, so kind preference cannot be made of it; "
                "leave it out of kinds"
            )
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError("kinds must name at least one kind, and each once")

    def _check_columns(self) -> None:
        """What is said of the columns of raw data must hold together, and name nothing that no format reads."""
        if self.source == "film_reviews" and (self.ignore_columns or self.on_unusable_row != "error"):
            raise ValueError(
                "ignore_columns and on_unusable_row are for raw data: with source film_reviews leave them [] and error"
            )
        if len(set(self.columns.values())) < len(self.columns):
            raise ValueError("columns gives two columns the same name")
        refuse_unknown_targets(self.columns)
        if len(set(self.ignore_columns)) < len(self.ignore_columns):
            raise ValueError("ignore_columns names a column twice")
        for name in self.ignore_columns:
            if name in self.columns:
                raise ValueError(f"'{name}' is in columns and in ignore_columns: choose one")

    def _check_source(self) -> None:
        """Each source has its own keys; a key of another one would be a setting that nothing obeys."""
        if (self.source == "local") != (self.path != NO_FILE):
            raise ValueError(
                f"path must be a file or folder with source local, and {NO_FILE} with any other: "
                f"found {self.path} with source {self.source}"
            )
        parts = PurePosixPath(self.path).parts
        if any(part == ".." and before != ".." for before, part in pairwise(parts)):
            raise ValueError(
                f"path must not go up with .. from a folder that it names: found {self.path}; "
                "behind a link DVC and the system would take it for two different places"
            )
        hub_keys = ("hub_dataset", "hub_revision", "hub_data_dir", "hub_split")
        set_keys = [key for key in hub_keys if getattr(self, key) is not None]
        if self.source != "hub" and set_keys:
            raise ValueError(f"{set_keys[0]} must be null with source {self.source}: it is for source hub")
        if self.source == "hub" and not HUB_NAME.fullmatch(self.hub_dataset or ""):
            raise ValueError(f"hub_dataset must be owner/name with source hub, found {self.hub_dataset}")
        if self.source == "hub" and not re.fullmatch("[0-9a-f]{40}", self.hub_revision or ""):
            raise ValueError(
                f"hub_revision must be a full commit hash of 40 hexadecimal digits, found {self.hub_revision!r}: "
                "a branch or tag may change under the same name"
            )
