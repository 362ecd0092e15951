"""The rows of all sources become prepared rows of a few kinds, in splits for training, validation and test.

What a row of each kind holds stands in `stages.lib.data.prepared_rows`, and where a row goes in
`stages.lib.data.row_places`: no prompt stands in two splits, nor a row twice; sources are mixed by weight or number.
The sources are read twice, for digests of their rows and then for the rows, so memory does not grow with them.

    python -m stages.prepare_data --sources data/sources --out data/prepared --metrics metrics/prepare_data.json
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from stages.lib.command.errors import StageError, one_line
from stages.lib.command.hashing import dvc_hashes
from stages.lib.command.jsonl import read_jsonl, write_json
from stages.lib.command.outputs import partial_name, remove, written_whole
from stages.lib.command.params import read_params, read_value
from stages.lib.command.run import run
from stages.lib.data.alike_rows import contaminated_rows, near_duplicates
from stages.lib.data.prepared_rows import KINDS, MAY_BE_EMPTY, SPLITS, Kind, Split
from stages.lib.data.prompt_digests import content_digest, digests_of_row
from stages.lib.data.row_places import FATES, DrawnShare, RowPlaces
from stages.lib.operations.run_log import log_run
from stages.lib.settings.prepare_data import PrepareData
from stages.lib.settings.sources import Sources, TaskSettings
from stages.lib.tasks.table import TASKS

ROWS_FILE = "rows.jsonl"
OTHER_ROW = "not what read_source writes; run read_source"


class TakenRow(NamedTuple):
    """A row of a source, of a kind that is wanted."""

    source: str
    kind: Kind
    split: Split | None  # if its source decides it
    values: dict[str, Any]


def taken_rows(folder: Path, sources: Sources, kinds: tuple[Kind, ...]) -> Iterator[TakenRow]:
    """The rows of all sources, one source after the other, of the kinds that are wanted."""
    for name in sources.by_name:
        path = folder / name / ROWS_FILE
        for number, values in enumerate(read_jsonl(path), start=1):
            kind, split = values.pop("kind", None), values.pop("split", None)
            if kind not in KINDS or split not in (None, *SPLITS):
                raise StageError(f"{path}, row {number}: {OTHER_ROW}@{name} again")
            if kind in kinds:
                yield TakenRow(name, kind, split, values)


def settle(places: RowPlaces, folder: Path, sources: Sources, settings: PrepareData, seed: int) -> None:
    """Work out what becomes of each row."""
    numbers = {name: number for number, name in enumerate(sources.by_name)}
    for name, kind, split, values in taken_rows(folder, sources, settings.kinds):
        try:
            digests = digests_of_row(values, seed)
            content = content_digest(values, kind, digests[-1])
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            raise StageError(f"{folder / name / ROWS_FILE}: a row of kind {kind} is {OTHER_ROW}@{name} again") from None
        places.add(numbers[name], kind, split, digests, content)
    places.divide({"test": settings.test_fraction, "validation": settings.validation_fraction})
    if settings.decontamination is not None:
        placed = placed_rows(places, folder, sources, settings)
        tests = (
            row.values for row, fate in placed if fate == "test" and row.source in settings.decontamination.sources
        )
        found = contaminated_rows(tests, train_rows(places, folder, sources, settings), settings.decontamination)
        places.leave_out(found, "contaminated")
    if settings.near_duplicates is not None:
        found = near_duplicates(train_rows(places, folder, sources, settings), settings.near_duplicates, seed)
        places.leave_out(found, "near_duplicate")
    shares = {numbers[name]: DrawnShare(source.weight, source.rows) for name, source in sources.by_name.items()}
    places.draw(shares, list(numbers), seed)


def placed_rows(
    places: RowPlaces, folder: Path, sources: Sources, settings: PrepareData
) -> Iterator[tuple[TakenRow, str]]:
    """Each row and what becomes of it."""
    return zip(taken_rows(folder, sources, settings.kinds), places.fates(), strict=True)


def train_rows(
    places: RowPlaces, folder: Path, sources: Sources, settings: PrepareData
) -> Iterator[tuple[int, Kind, dict[str, Any]]]:
    """(number, kind, values) of the rows that go into train."""
    for number, (row, fate) in enumerate(placed_rows(places, folder, sources, settings)):
        if fate == "train":
            yield number, row.kind, row.values


def write_prepared(rows: Iterator[tuple[TakenRow, str]], kinds: tuple[Kind, ...], folders: dict[Split, Path]) -> None:
    """Write every row that goes into a split to the file of its kind there, with the name of its source."""
    with ExitStack() as stack:
        files = {}
        for split, folder in folders.items():
            folder.mkdir(parents=True)
            for kind in kinds:
                files[split, kind] = stack.enter_context((folder / f"{kind}.jsonl").open("w", encoding="utf-8"))
        for row, fate in rows:
            if fate in folders:
                line = json.dumps(row.values | {"source": row.source}, ensure_ascii=False)
                files[fate, row.kind].write(line + "\n")


def rows_by_fate(counts: Mapping[tuple[int, int, int], int], names: list[str], kinds: tuple[Kind, ...]) -> Counter[str]:
    """Rows of each kind and split, and of each source and kind what became of them."""
    found = Counter({f"{kind}/{split}_rows": 0 for kind in kinds for split in SPLITS})
    for (source, kind, fate), count in counts.items():
        what = f"{FATES[fate]}_rows" if FATES[fate] in SPLITS else f"dropped/{FATES[fate]}"
        found[f"{names[source]}/{KINDS[kind]}/{what}"] += count
        if FATES[fate] in SPLITS:
            found[f"{KINDS[kind]}/{what}"] += count
    return found


def rows_lacking(sources: Sources, counts: Mapping[str, int], kinds: tuple[Kind, ...]) -> dict[str, int]:
    """By how many train rows of a kind each source has fewer than it is to give (its `rows`), where it does."""
    lacking = {}
    for name, source in sources.by_name.items():
        for kind in kinds:
            there = counts.get(f"{name}/{kind}/train_rows", 0)
            if source.rows is not None and kind in source.kinds and there < source.rows:
                lacking[f"{name}/{kind}/train_rows_lacking"] = source.rows - there
    return lacking


def warn_of_lack(sources: Sources, counts: Mapping[str, int], lacking: Mapping[str, int]) -> None:
    for key, number in lacking.items():
        name, kind, _ = key.split("/")
        there = counts.get(f"{name}/{kind}/train_rows", 0)
        print(
            f"warning: {sources.place_of(name)}.rows: {there + number} train rows of kind {kind} are asked for, and "
            f"{there} are there; all of them are taken",
            file=sys.stderr,
        )


def require_rows(metrics: Mapping[str, int], kinds: tuple[Kind, ...]) -> None:
    """Raise StageError if a kind has no rows in a split that a stage reads."""
    for kind in kinds:
        for split in SPLITS:
            if not metrics[f"{kind}/{split}_rows"] and (kind, split) not in MAY_BE_EMPTY:
                dropped = Counter(
                    {key.rpartition("/")[2]: 0 for key in metrics if f"/{kind}/dropped/" in key},
                )
                for key, count in metrics.items():
                    if f"/{kind}/dropped/" in key:
                        dropped[key.rpartition("/")[2]] += count
                left_out = "".join(f", {count} left out as {reason}" for reason, count in sorted(dropped.items()))
                help_ = "" if split == "train" else f"; raise prepare_data.{split}_fraction, or"
                raise StageError(
                    f"no row of kind {kind} is in the split {split}{left_out}{help_ or ';'} give a source of that kind "
                    f"with split: {split}"
                )


def known_of_tests(sources: Sources, metrics: Mapping[str, int], seed: int) -> dict[str, float]:
    """What a task knows of its rows, where all test pairs are its own: the best accuracy that labels allow."""
    known: dict[str, float] = {}
    for name, source in sources.by_name.items():
        pairs = metrics.get(f"{name}/preference/test_rows", 0)
        if isinstance(source, TaskSettings) and pairs and pairs == metrics["preference/test_rows"] == source.test_rows:
            known |= TASKS[source.task].known(source, seed)
    return known


def remove_left_over(folder: Path, sources: Sources) -> None:
    """Remove the rows of sources that params.yaml names no longer: DVC leaves them, and would take them for a dep."""
    for path in sorted(folder.iterdir()):
        if path.name not in sources.by_name and (path / ROWS_FILE).is_file():
            print(one_line(f"{path} is removed: params.yaml names no such source"))
            remove(path)


def main(
    sources: Annotated[Path, typer.Option(help="Folder with the sources' folders.")],
    out: Annotated[Path, typer.Option(help="Folder to write the rows below, a folder for each split.")],
    metrics: Annotated[Path, typer.Option(help="JSON file of the counts to write.")],
) -> None:
    """Divide the rows of all sources among the splits, each once."""
    started = time.monotonic()
    settings = read_params("prepare_data", PrepareData)
    named, seed = read_params("sources", Sources), read_value("seed", int)
    database = partial_name(out / "places")
    database.parent.mkdir(parents=True, exist_ok=True)
    remove(database)
    remove_left_over(sources, named)
    try:
        with (
            RowPlaces(database) as places,
            written_whole(*(out / split for split in SPLITS), metrics) as (*folders, metrics_partial),
        ):
            settle(places, sources, named, settings, seed)
            counts = rows_by_fate(places.counts(), list(named.by_name), settings.kinds)
            require_rows(counts, settings.kinds)
            rows = placed_rows(places, sources, named, settings)
            write_prepared(rows, settings.kinds, dict(zip(SPLITS, folders, strict=True)))
            lacking = rows_lacking(named, counts, settings.kinds)
            warn_of_lack(named, counts, lacking)
            values = dict(sorted({**counts, **lacking, **known_of_tests(named, counts, seed)}.items()))
            write_json(metrics_partial, values)
    finally:
        remove(database)
    log_run("prepare_data", dvc_hashes([*(out / split for split in SPLITS), metrics]), time.monotonic() - started)
    for key, value in values.items():
        print(f"{key:48} {value}")


if __name__ == "__main__":
    run(main)
