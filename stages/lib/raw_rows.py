"""Raw rows as people bring them: files of several types, read row by row, or a data set of the Hugging Face Hub.

Files are read by plain parsers and not through a table, so that an error names its line, values keep their types and
no copy of the data is made.
"""

import csv
import functools
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from stages.lib.errors import StageError
from stages.lib.jsonl import parse_object

Row = dict[str, Any]
DOCUMENTS = ("license", "licence", "readme", "note", "notice", "citation")


def local_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) of a data file, or of all data files below a folder in the order of their names.

    `where` is the file and the line or row, counted from 1, as an error message names it.

    Raises:
        StageError: there is no such file, its type is unknown, it is empty or malformed (file and line are named).
    """
    for file in data_files(path):
        empty = True
        try:
            for where, row in reader_of(file)(file):
                empty = False
                yield where, row
        except UnicodeDecodeError as error:
            raise StageError(f"{file}, line {undecodable_line(file)}: not UTF-8 text ({error.reason})") from None
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise StageError(f"{file}: not a whole gzip file ({error})") from None
        if empty:
            raise StageError(f"{file} is empty: expected at least one row")


def data_files(path: Path) -> list[Path]:
    """The file itself, or the data files below a folder; documents and hidden files in it are passed over."""
    if not path.exists():
        raise StageError(f"{path} does not exist: expected a data file ({', '.join(READERS)}) or a folder of them")
    if path.is_file():
        return [path]
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not is_document(file.relative_to(path))]
    if not files:
        raise StageError(f"{path} holds no data file: expected at least one of {', '.join(READERS)}")
    return files


def is_document(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts)
    return hidden or file.suffix == ".md" or file.name.lower().split(".")[0] in DOCUMENTS


def reader_of(file: Path) -> Callable[[Path], Iterator[tuple[str, Row]]]:
    for suffix, reader in READERS.items():
        if file.name.lower().endswith(suffix):
            return reader
    raise StageError(f"{file}: no data file that can be read here, expected one of {', '.join(READERS)}")


def open_text(file: Path) -> TextIO:
    """Open a plain or gzipped text file. A byte order mark, as some programs write it, is no part of the text."""
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return file.open(encoding="utf-8-sig", newline="")


def undecodable_line(file: Path) -> int:
    """The first line, counted from 1, that is no UTF-8. The text readers decode blocks, so they cannot tell."""
    with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as lines:
        numbered = enumerate(lines, start=1)
        return next(number for number, line in numbered if line.decode("utf-8", errors="ignore").encode() != line)


def json_lines(file: Path) -> Iterator[tuple[str, Row]]:
    with open_text(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                yield where, parse_object(line, where)


def json_array(file: Path) -> Iterator[tuple[str, Row]]:
    """A JSON array of objects. Many `.json` files hold JSON lines: the first character tells which it is."""
    with open_text(file) as text:
        first = next((line for line in text if line.strip()), "")
    if first.lstrip().startswith("{"):
        yield from json_lines(file)
        return
    with open_text(file) as text:
        content = text.read()
    if not content.strip():
        return
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        raise StageError(f"{file}, line {error.lineno}: not valid JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(rows, list):
        raise StageError(f"{file}: expected an array of objects, found {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise StageError(f"{file}, row {number}: expected a JSON object, found {type(row).__name__}")
        yield f"{file}, row {number}", row


def csv_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a CSV file with a header; every value is text."""
    csv.field_size_limit(sys.maxsize)
    with open_text(file) as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                where = f"{file}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise StageError(f"{where}: expected {len(reader.fieldnames or ())} fields, as in the header")
                yield where, row
        except csv.Error as error:
            raise StageError(f"{file}, line {reader.reader.line_num}: not valid CSV ({error})") from None


def parquet_rows(file: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise StageError(f"{file}: not a Parquet file that can be read ({error})") from None


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".jsonl": json_lines,
    ".jsonl.gz": json_lines,
    ".json": json_array,
    ".json.gz": json_array,
    ".csv": csv_rows,
    ".csv.gz": csv_rows,
    ".parquet": parquet_rows,
}


def hub_rows(dataset: str, revision: str, data_dir: str | None, split: str | None) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) of a Hub data set at one commit: of one split, or of all, one after the other.

    Raises:
        StageError: the Hub cannot be reached, or has no such data set, commit, folder or split.
    """
    for name, rows in hub_splits(dataset, revision, data_dir, split).items():
        for number, row in enumerate(rows, start=1):
            yield f"{dataset}, split {name}, row {number}", row


@functools.cache  # the rows are read more than once, and the Hub need not be asked again
def hub_splits(dataset: str, revision: str, data_dir: str | None, split: str | None) -> dict[str, Any]:
    import datasets

    wanted = f"data set {dataset} at revision {revision}" + (f", folder {data_dir}" if data_dir else "")
    try:
        loaded = datasets.load_dataset(dataset, data_dir=data_dir, revision=revision, split=split)
    except Exception as error:  # of many unrelated types: from the network, the Hub's answers and the files themselves
        # This one only says that a file could not be read; what it was raised from says why.
        told = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        reason = " ".join(str(told or error).split())
        raise StageError(
            f"{wanted} could not be loaded from the Hub ({type(told or error).__name__}: {reason}); "
            "check the name, the revision and the network"
        ) from None
    return {split: loaded} if split else dict(loaded)
