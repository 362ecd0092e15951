"""Rows of a data set of the Hugging Face Hub at one commit: all of it, one split, or a slice of one.

Without streaming the whole data set is downloaded and kept in the library's cache. With streaming a file is read as it
comes, and no further than the rows asked for.
"""

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from stages.lib.command.errors import StageError
from stages.lib.data.hub_files import Repository, fetched, without_network
from stages.lib.data.raw_rows import ROWS_OF_A_BATCH, RawRow, arrow_rows

SLICED = re.compile(r"([\w.-]+)\[(-?\d*%?):(-?\d*%?)\]")  # train[10:20], train[:10%]: as the library writes it
DESCRIPTIONS = ("README.md", "dataset_infos.json")  # which may say what its splits and columns are
STREAMED = re.compile(r"([\w.-]+)\[(\d*):(\d*)\]")


class HubData(NamedTuple):
    """What to read of the Hub."""

    dataset: str  # owner/name
    revision: str  # a full commit hash
    config: str | None
    data_dir: str | None
    split: str | None  # or a slice of one
    streaming: bool

    @property
    def repository(self) -> Repository:
        return Repository("dataset", self.dataset, self.revision)

    @property
    def part(self) -> tuple[str | None, str | None]:
        """What of the repository it is."""
        return self.config, self.data_dir

    def __str__(self) -> str:
        parts = {"config": self.config, "folder": self.data_dir, "split": self.split}
        told = "".join(f", {what} {name}" for what, name in parts.items() if name is not None)
        return f"data set {self.dataset} at revision {self.revision}{told}"


def refuse_unreadable_split(split: str, streaming: bool) -> None:
    """Raise a ValueError if `split` is neither a split's name nor a slice of one that can be read."""
    if streaming and "[" in split and not STREAMED.fullmatch(split):
        raise ValueError(f"hub_split: with streaming a slice is of rows from the start, as train[:5000]; found {split}")
    if not (re.fullmatch(r"[\w.-]+", split) or SLICED.fullmatch(split)):
        raise ValueError(f"hub_split must be a split, or rows of one as train[:5000] or train[10%:20%]; found {split}")


def hub_rows(data: HubData, count: int | None) -> Iterator[tuple[str, RawRow]]:
    """Yield (where, row) of at most `count` rows, of one split or of all, one after the other.

    Raises:
        StageError: the Hub cannot be reached, or has no such data set, commit, configuration, folder or split.
    """
    rows = (
        (where, row) for name, split in hub_splits(data).items() for where, row in rows_of(data, name, split, count)
    )
    yield from islice(rows, count)


def rows_of(data: HubData, name: str, split: Any, count: int | None) -> Iterator[tuple[str, RawRow]]:
    number = 0
    size = ROWS_OF_A_BATCH if count is None else min(count, ROWS_OF_A_BATCH)
    where = f"{data.dataset}, split {name}"
    try:
        # As Arrow holds them: nothing is decoded that is not used, such as pictures.
        for table in split.with_format("arrow").iter(size):
            for row in arrow_rows(table, where, number):
                number += 1
                yield f"{where}, row {number}", row
    except StageError:
        raise
    except Exception as error:  # of many unrelated types, where rows are read as they come
        raise not_of_hub(data, error) from None
    if data.streaming and not number:
        raise StageError(f"{where} holds no row; look at hub_split")


def hub_splits(data: HubData) -> dict[str, Any]:
    """Split → its rows, loaded or to be streamed."""
    import datasets

    if Path(data.dataset).exists():
        raise StageError(
            f"dataset: {data.dataset} is also a file or folder here, which the library would read instead of the "
            "Hub's; rename that, or read it as a source of files"
        )
    sliced = STREAMED.fullmatch(data.split or "") if data.streaming else None
    path, revision = (str(fetched_folder(data)), None) if without_network() else (data.dataset, data.revision)
    try:
        loaded: Any = datasets.load_dataset(
            path,
            data.config,
            data_dir=data.data_dir,
            revision=revision,
            split=sliced[1] if sliced else data.split,
            streaming=data.streaming,
        )
    except Exception as error:  # of many unrelated types: from the network, the Hub's answers and the files themselves
        raise not_of_hub(data, error) from None
    if sliced:
        start = int(sliced[2] or 0)
        loaded = loaded.skip(start)
        loaded = loaded.take(max(0, int(sliced[3]) - start)) if sliced[3] else loaded
    return {data.split: loaded} if data.split else dict(loaded)


def fetched_folder(data: HubData) -> Path:
    """Where `make fetch` has put the files of a data set, for a run without a network.

    Raises:
        StageError: it is not there, or its folder gives other files than the Hub did.
    """
    found = fetched(data.repository, data.part)
    if found is None:
        raise StageError(
            f"{data} is not in the cache, and HF_HUB_OFFLINE is set: run `make fetch` where there is a network"
        )
    folder, files = found
    read = {os.path.relpath(path, folder) for path in files_of_builder(data, str(folder), None)}
    other = read ^ files.difference(DESCRIPTIONS)
    if other:
        raise StageError(
            f"{data}: in the cache it has other files than on the Hub, such as {min(other)}; remove {folder}"
        )
    return folder


def hub_files_of(data: HubData) -> list[str]:
    """The paths in its repository of the files that a data set on the Hub is read from.

    Raises:
        StageError: the Hub cannot be reached, or has no such data set, commit, configuration, folder or split.
    """
    start = f"hf://datasets/{data.dataset}@{data.revision}/"
    files = [path.removeprefix(start) for path in files_of_builder(data, data.dataset, data.revision)]
    for path in files:
        if "://" in path or path.startswith("/"):
            raise StageError(f"{data} is read from {path}, which lies outside its repository, and cannot be fetched")
    return files + [name for name in DESCRIPTIONS if is_on_the_hub(data, name)]


def files_of_builder(data: HubData, path: str, revision: str | None) -> list[str]:
    """Addresses of the files of all splits, each once. Raises StageError as `hub_files_of`."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(path, data.config, data_dir=data.data_dir, revision=revision)
    except Exception as error:  # as above
        raise not_of_hub(data, error) from None
    splits: Any = builder.config.data_files or {}
    name = (data.split or "").partition("[")[0]
    if name and name not in splits:
        raise StageError(f"{data}: it has no split {name}, but {', '.join(map(str, splits)) or 'none'}")
    return [*dict.fromkeys(str(path) for paths in splits.values() for path in paths)]


def is_on_the_hub(data: HubData, file: str) -> bool:
    from huggingface_hub import HfApi

    return HfApi().file_exists(data.dataset, file, repo_type="dataset", revision=data.revision)


def not_of_hub(data: HubData, error: Exception) -> StageError:
    import datasets

    # This one only says that a file could not be read; what it was raised from says why.
    told = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
    reason = " ".join(str(told or error).split())
    return StageError(
        f"{data} could not be loaded from the Hub ({type(told or error).__name__}: {reason}); "
        "check the name, the revision and the network"
    )
