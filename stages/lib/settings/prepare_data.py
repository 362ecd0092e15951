"""Section `prepare_data` of params.yaml: where rows come from, how they are read, and what is made of them."""

import re
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import model_validator

from stages.lib.command.json_schema import LARGEST_WHOLE
from stages.lib.data.formats import WITHOUT_PAIRS, Format
from stages.lib.data.prepared_rows import Kind
from stages.lib.data.raw_columns import refuse_unknown_targets
from stages.lib.settings.bounds import BetweenZeroAndOne, ErrorOrDrop, Several, Temperature, Text
from stages.lib.settings.declaration import Settings, block, key

NO_FILE = "data/raw/none"
HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
# Below the number of distinct prompts (test: about 125 000), so drawing new ones stays quick.
GeneratedRows = Annotated[int, Ge(1), Le(100_000)]


class FilmReviewSettings(Settings):
    """Sizes of the generated task, and how noisy its preference labels are."""

    sft_rows: GeneratedRows = key(7500, "of the train split", unit="rows")
    preference_rows: GeneratedRows = key(8000, "of the train split", unit="pairs")
    prompt_rows: GeneratedRows = key(1500, "of the train split", unit="prompts")
    validation_rows: GeneratedRows = key(500, "of the validation split of each kind", unit="rows")
    test_rows: GeneratedRows = key(1500, "of the test split of each kind", unit="rows")
    label_temperature: Temperature = key(
        2.0, "of the Bradley-Terry labels; higher is noisier", unit="of the gold utility"
    )


class PrepareData(Settings):
    """Raw rows become conversations, in splits for training, validation and test."""

    source: Literal["film_reviews", "local", "hub"] = key(
        "film_reviews",
        "film_reviews: generated | local: files at path | hub: hub_dataset of the Hugging Face Hub",
    )
    path: Text = key(
        NO_FILE,
        "source local: a .jsonl, .json, .csv (each also .gz) or .parquet file, or a folder of them; else " + NO_FILE,
    )
    hub_dataset: Text | None = key(None, "source hub: owner/name; null with any other source, as the next three")
    hub_revision: Text | None = key(None, "source hub: full commit hash, 40 hexadecimal digits")
    hub_data_dir: Text | None = key(None, "source hub: a folder of the data set; null: all of it")
    hub_split: Text | None = key(
        None, "source hub: one split, such as train; null: all of them together (they are split again here)"
    )
    format: Literal["auto", Format] = key("auto", "of the raw rows; auto with film_reviews")
    columns: dict[Text, Text] = key(
        {},
        "own column: ours (prompt, chosen, rejected, …), renamed before the format is detected or read; {} with "
        "film_reviews",
    )
    ignore_columns: Several[Text] = key(
        [],
        "own columns and keys of messages to leave out, where nothing reads what they say (tools, weight, …); [] with "
        "film_reviews",
    )
    on_unusable_row: ErrorOrDrop = key(
        "error",
        "error: stop at a row with a role, content or value that cannot be used | drop: leave it out, counted; error "
        "with film_reviews",
    )
    kinds: Several[Kind] = key(
        ["sft", "preference", "prompts"],
        "kinds to make; one left out has no files",
    )
    max_rows: Annotated[int, Ge(2), Le(LARGEST_WHOLE)] | None = key(
        None, "use the first so many; null: all; null with film_reviews", unit="raw rows"
    )
    validation_fraction: BetweenZeroAndOne = key(
        0.05, "held out from training, to choose by; for local and hub data", unit="share of the distinct prompts"
    )
    test_fraction: BetweenZeroAndOne = key(
        0.05, "held out for the evaluation alone; for local and hub data", unit="share of the distinct prompts"
    )
    film_reviews: FilmReviewSettings = key(block(FilmReviewSettings), "sizes of the generated task")

    @model_validator(mode="after")
    def _check(self) -> "PrepareData":
        self._check_source()
        self._check_columns()
        if self.source == "film_reviews" and (self.format != "auto" or self.columns or self.max_rows is not None):
            raise ValueError("format, columns and max_rows are for raw data: with source film_reviews leave them unset")
        if self.format in WITHOUT_PAIRS and "preference" in self.kinds:
            raise ValueError(
                f"format {self.format} has no rejected replies, so kind preference cannot be made of it; "
                "leave it out of kinds"
            )
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                "validation_fraction and test_fraction leave nothing for training: they must be below 1 together"
            )
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError("kinds must name at least one kind, and each once")
        return self

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
