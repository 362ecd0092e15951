"""Rows of a data set of the Hugging Face Hub at one commit: all of it, one split, or a slice of one.

Without streaming the whole data set is downloaded and kept in the library's cache. With streaming a file is read as it
comes, and no further than the rows asked for.
"""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from stages.lib.command.errors import StageError
from stages.lib.data.raw_rows import ROWS_OF_A_BATCH, RawRow, arrow_rows

SLICED = re.compile(r"([\w.-]+)\[(-?\d*%?):(-?\d*%?)\]")  # train[10:20], train[:10%]: as the library writes it
STREAMED = re.compile(r"([\w.-]+)\[(\d*):(\d*)\]")


class HubData(NamedTuple):
    """What to read of the Hub."""

    dataset: str  # owner/name
    revision: str  # a full commit hash
    config: str | None
    data_dir: str | None
    split: str | None  # or a slice of one
    streaming: bool

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
        raise not_loaded(data, error) from None
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
    try:
        loaded: Any = datasets.load_dataset(
            data.dataset,
            data.config,
            data_dir=data.data_dir,
            revision=data.revision,
            split=sliced[1] if sliced else data.split,
            streaming=data.streaming,
        )
    except Exception as error:  # of many unrelated types: from the network, the Hub's answers and the files themselves
        raise not_loaded(data, error) from None
    if sliced:
        start = int(sliced[2] or 0)
        loaded = loaded.skip(start)
        loaded = loaded.take(max(0, int(sliced[3]) - start)) if sliced[3] else loaded
    return {data.split: loaded} if data.split else dict(loaded)


def not_loaded(data: HubData, error: Exception) -> StageError:
    import datasets

    # This one only says that a file could not be read; what it was raised from says why.
    told = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
    reason = " ".join(str(told or error).split())
    return StageError(
        f"{data} could not be loaded from the Hub ({type(told or error).__name__}: {reason}); "
        "check the name, the revision and the network"
    )
