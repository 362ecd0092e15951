"""Section `sources` of params.yaml: where rows come from and how they are read, each source under its own name."""

import re
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Annotated, Literal

from annotated_types import Ge, Le, MaxLen
from pydantic import StrictBool, model_validator

from stages.lib.command.errors import StageError
from stages.lib.command.json_schema import LARGEST_WHOLE
from stages.lib.data.formats import WITHOUT_PAIRS, Format, refuse_disagreement
from stages.lib.data.hub_data import HubData, refuse_unreadable_split
from stages.lib.data.prepared_rows import Kind, Split
from stages.lib.data.raw_columns import refuse_unknown_targets
from stages.lib.settings.bounds import Count, ErrorOrDrop, Name, Positive, Several, Text
from stages.lib.settings.declaration import Settings, block, key
from stages.lib.settings.reading import ReadingOptions
from stages.lib.settings.task_sources import ArithmeticSettings, FilmReviewSettings

HUB_NAME = re.compile(r"(?!.*\.\.)[\w.-]{1,96}(/[\w.-]{1,96})?")
TaskName = Literal["film_reviews", "arithmetic"]
TaskSettings = FilmReviewSettings | ArithmeticSettings  # of whichever task


class RowSettings(ReadingOptions):
    """How the raw rows of a source are read, and which of them are used for what."""

    kinds: Several[Kind] = key(["sft"], "kinds of rows it serves; pairs serve sft by the chosen reply, and prompts too")
    format: Literal["auto", Format] = key("auto", "of the raw rows; auto: the only one that they can be of")
    columns: dict[Text, Text] = key(
        {}, "own column: ours (prompt, chosen, rejected, …), renamed before the format is detected or read"
    )
    ignore_columns: Several[Text] = key(
        [], "own columns and keys of messages to leave out, where nothing reads what they say (tools, weight, …)"
    )
    facts: Several[Text] = key([], "own columns that ride on with prompts, for rewards and metrics (answer, id, …)")
    task: TaskName | None = key(None, "whose prompts they are: it grades the responses by the facts; null: of none")
    split: Split | None = key(None, "where all rows go: train | validation | test; null: divided here by prompt")
    weight: Positive | None = key(
        None, "in the mixture of train rows of each kind, beside other sources' weights; null: all its rows"
    )
    rows: Count | None = key(None, "train rows of each kind to draw; null: all, or by weight", unit="rows")
    max_rows: Annotated[int, Ge(1), Le(LARGEST_WHOLE)] | None = key(
        None, "read the first so many; null: all", unit="raw rows"
    )
    on_unusable_row: ErrorOrDrop = key(
        "error",
        "error: stop at a row with a role, content or value that cannot be used | drop: leave it out, counted",
    )

    @model_validator(mode="after")
    def _check_rows(self) -> "RowSettings":
        refuse_repeated(self.kinds, "kinds names")
        if not self.kinds:
            raise ValueError("kinds must name at least one kind")
        if self.weight is not None and self.rows is not None:
            raise ValueError("weight and rows each say how many train rows to draw: give one of them")
        if self.split in ("validation", "test") and (self.weight is not None or self.rows is not None):
            raise ValueError(f"weight and rows draw train rows, and all rows of split {self.split} are used")
        if self.format in WITHOUT_PAIRS and "preference" in self.kinds:
            raise ValueError(f"format {self.format} has no rejected replies: leave preference out of kinds")
        if self.task is not None and "prompts" not in self.kinds:
            raise ValueError("task is what grades responses to prompts: serve prompts, or leave it null")
        if self.comparison is not None and self.comparison.margin == "gap" and "preference" not in self.kinds:
            raise ValueError("comparison.margin: gap gives pairs a margin: serve preference, or make it none")
        if self.facts and "prompts" not in self.kinds:
            raise ValueError(
                "facts ride on with prompts alone: serve prompts, or leave facts empty and put the columns into "
                "ignore_columns"
            )
        try:
            refuse_disagreement(self.format, self)
        except StageError as error:
            raise ValueError(str(error)) from None
        self._check_columns()
        return self

    def _check_columns(self) -> None:
        """What is said of the columns must hold together, and name nothing that no format reads."""
        refuse_repeated(tuple(self.columns.values()), "columns gives two columns the name")
        refuse_unknown_targets(self.columns)
        refuse_repeated(self.ignore_columns, "ignore_columns names")
        refuse_repeated(self.facts, "facts names")
        for name in self.ignore_columns:
            if name in self.columns or name in self.facts:
                place = "columns" if name in self.columns else "facts"
                raise ValueError(f"'{name}' is in {place} and in ignore_columns: choose one")


class FileSource(RowSettings):
    """Rows of files."""

    path: Text = key(
        "data/raw/rows.jsonl", "a .jsonl, .json, .csv, .tsv (each also .gz) or .parquet file, or a folder of them"
    )

    delimiter: Literal[",", ";", "\t"] | None = key(
        None, "of CSV files; null: the only one of comma, semicolon and tab that is in the header (.tsv: tab)"
    )
    rows_key: Text | None = key(
        None,
        "of JSON files that hold an object: where in it the list of rows stands, such as data.rows; null: no object",
    )

    @model_validator(mode="after")
    def _check_path(self) -> "FileSource":
        parts = PurePosixPath(self.path).parts
        if any(part == ".." and before != ".." for before, part in pairwise(parts)):
            raise ValueError(
                f"path must not go up with .. from a folder that it names: found {self.path}; "
                "behind a link DVC and the system would take it for two different places"
            )
        return self


class HubSource(RowSettings):
    """Rows of a data set of the Hugging Face Hub at one commit."""

    dataset: Text = key("owner/name", "owner/name")
    revision: Text = key("0" * 40, "full commit hash, 40 hexadecimal digits: a branch or tag can move")
    config: Text | None = key(None, "configuration (subset) of the data set; null: its only one, or the default")
    data_dir: Text | None = key(None, "folder of the data set; null: all of it")
    hub_split: Text | None = key(
        None, "one split, or rows of it, such as train[:5000] or train[10%:20%]; null: all splits together"
    )
    streaming: StrictBool = key(
        False, "true: download no more than the rows asked for (max_rows, or a slice in rows), at each run again"
    )

    @property
    def data(self) -> HubData:
        """What is read of the Hub."""
        return HubData(self.dataset, self.revision, self.config, self.data_dir, self.hub_split, self.streaming)

    @model_validator(mode="after")
    def _check_hub(self) -> "HubSource":
        if not HUB_NAME.fullmatch(self.dataset):
            raise ValueError(f"dataset must be owner/name, found {self.dataset}")
        if not re.fullmatch("[0-9a-f]{40}", self.revision):
            raise ValueError(
                f"revision must be a full commit hash of 40 hexadecimal digits, found {self.revision!r}: "
                "a branch or tag may change under the same name"
            )
        if self.hub_split is not None:
            refuse_unreadable_split(self.hub_split, self.streaming)
        return self


def refuse_repeated(names: tuple[str, ...], what: str) -> None:
    """Raise a ValueError if a name stands twice."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{what} '{repeated[0]}' twice")


class Sources(Settings):
    """Sources by name: of files, of the Hub, and made by tasks."""

    files: Annotated[dict[Name, FileSource], MaxLen(1000)] = key({}, "files by name, with how their rows are read")
    hub: Annotated[dict[Name, HubSource], MaxLen(1000)] = key({}, "data sets of the Hugging Face Hub by name")
    tasks: Annotated[dict[Name, FilmReviewSettings], MaxLen(1000)] = key(
        {"film_reviews": block(FilmReviewSettings)}, "tasks that make their own rows, by name"
    )
    arithmetic: Annotated[dict[Name, ArithmeticSettings], MaxLen(1000)] = key(
        {}, "problems of the task arithmetic, which has keys of its own, by name"
    )

    @model_validator(mode="after")
    def _check(self) -> "Sources":
        names = [*self.files, *self.hub, *self.tasks, *self.arithmetic]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two sources are named {repeated[0]}, of files, hub, tasks and arithmetic")
        if not names:
            raise ValueError("files, hub, tasks and arithmetic name no source, and so there is no row to train on")
        return self

    @property
    def by_name(self) -> "dict[str, FileSource | HubSource | TaskSettings]":
        """All of them, in the order in which their rows are taken."""
        return {**self.files, **self.hub, **self.tasks, **self.arithmetic}

    def place_of(self, name: str) -> str:
        """Where a source stands in params.yaml."""
        group = next(group for group in ("files", "hub", "tasks", "arithmetic") if name in getattr(self, group))
        return f"sources.{group}.{name}"
