"""Raw rows as people bring them: files of several types, read row by row.

Files are read by plain parsers and not through a table, so that an error names its line, values keep their types and
no copy of the data is made. What a parser would pass over is an error: a name that stands twice in a header or an
object, a file that cannot be read, a folder behind a link (DVC's hash of a folder does not cover it).
"""

import csv
import functools
import gzip
import json
import stat
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from stages.lib.command.errors import StageError, one_line
from stages.lib.command.jsonl import parse_json, parse_object

if TYPE_CHECKING:
    import pyarrow

RawRow = dict[str, Any]
DOCUMENTS = ("license", "licence", "readme", "note", "notice", "citation")
ROWS_OF_A_BATCH = 1000
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
KINDS_OF_FILE = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# How a file begins that is not the text which its name promises.
OTHER_CONTENTS = {
    b"\xff\xfe": "it looks like UTF-16; save it as UTF-8",
    b"\xfe\xff": "it looks like UTF-16; save it as UTF-8",
    b"\x1f\x8b": "it looks gzipped; give its name the ending .gz",
    b"PAR1": "it looks like Parquet; give its name the ending .parquet",
}


class FileOptions(NamedTuple):
    """What the name of a file does not tell of its type."""

    delimiter: str | None = None  # of CSV; None: the only one that the header has
    rows_key: str | None = None  # where in a JSON object the list of rows stands: keys with dots between them


def local_rows(path: Path, options: FileOptions) -> Iterator[tuple[str, RawRow]]:
    """Yield (where, row) of a data file, or of all data files below a folder in the order of their names.

    `where` is the file and the line or row, counted from 1, as an error message names it.

    Raises:
        StageError: there is no such file, its type is unknown, it is empty or malformed (file and line are named).
        OSError: it cannot be opened.
    """
    files = data_files(path)
    refuse_unread_options(files, options)
    for file in files:
        empty = True
        try:
            for where, row in reader_of(file)(file, options):
                empty = False
                yield where, row
        except UnicodeDecodeError as error:
            raise StageError(f"{file}, line {undecodable_line(file)}: {not_utf8(file, error)}") from None
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise StageError(f"{file}: not a whole gzip file ({error})") from None
        if empty:
            raise StageError(f"{file} is empty: expected at least one row")


def refuse_unread_options(files: list[Path], options: FileOptions) -> None:
    """Raise a StageError for an option that none of the files is read with."""
    readers = [reader_of(file) for file in files]
    for name, value, users in (
        ("delimiter", options.delimiter, (csv_rows, tsv_rows)),
        ("rows_key", options.rows_key, (json_array,)),
    ):
        if value is not None and not any(reader in users for reader in readers):
            endings = " or ".join(ending for ending, reader in FILE_READERS.items() if reader in users)
            raise StageError(f"{files[0]}: {name} is for files that end in {endings}; make it null")


def data_files(path: Path) -> list[Path]:
    """The file itself, or the data files below a folder; one line names the documents and hidden files in it.

    Raises:
        StageError: something else lies there: a broken link, a folder behind a link, a FIFO, a socket, a device.
        OSError: a folder cannot be listed.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        known = ", ".join(FILE_READERS)
        raise StageError(f"{path} does not exist: expected a data file ({known}) or a folder of them") from None
    if not path.is_dir():
        return [regular(path)]
    passed_over: list[Path] = []
    files = sorted(raw_files_below(path, path, passed_over))
    if not files:
        raise StageError(f"{path} holds no data file: expected at least one of {', '.join(FILE_READERS)}")
    if passed_over:
        names = ", ".join(entry.relative_to(path).as_posix() for entry in passed_over)
        tell_once(one_line(f"{path}: documents and hidden files are not read: {names}"))
    return files


@functools.cache
def tell_once(line: str) -> None:
    """Print a line, be the folder that it is about read as often as it may."""
    print(line)


def raw_files_below(folder: Path, top: Path, passed_over: list[Path]) -> Iterator[Path]:
    """The data files below a folder; documents and hidden entries of it are added to `passed_over`."""
    for entry in sorted(folder.iterdir()):
        if is_document(entry.relative_to(top)):
            passed_over.append(entry)
            continue
        if not entry.is_dir():
            yield regular(entry)
        elif entry.is_symlink():
            raise StageError(
                f"{entry} is a link to a folder, which DVC does not follow in a folder: the data would change without "
                "its knowledge; put the folder itself there, or name it as the path"
            )
        else:
            yield from raw_files_below(entry, top, passed_over)


def regular(path: Path) -> Path:
    """The path, if it is a file or a link to one."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if not path.is_symlink():
            raise
        raise StageError(f"{path} is a link that leads to no file ({error.strerror}); mend it or remove it") from None
    if not stat.S_ISREG(mode):
        found = KINDS_OF_FILE.get(stat.S_IFMT(mode), "of an unknown kind")
        raise StageError(f"{path} is {found}: expected a data file; remove it")
    return path


def is_document(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts)
    return hidden or file.suffix.lower() == ".md" or file.name.lower().split(".")[0] in DOCUMENTS


def reader_of(file: Path) -> "FileReader":
    for suffix, reader in FILE_READERS.items():
        if file.name.lower().endswith(suffix):
            return reader
    raise StageError(f"{file}: not a data file that can be read here, expected one of {', '.join(FILE_READERS)}")


def open_text(file: Path) -> TextIO:
    """Open a plain or gzipped text file. A byte order mark, as some programs write it, is not part of the text."""
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return file.open(encoding="utf-8-sig", newline="")


def not_utf8(file: Path, error: UnicodeDecodeError) -> str:
    with file.open("rb") as content:
        start = content.read(4)
    hints = [hint for bytes_, hint in OTHER_CONTENTS.items() if start.startswith(bytes_) and file.suffix != ".gz"]
    return f"not UTF-8 text ({error.reason})" + "".join(f"; {hint}" for hint in hints)


def undecodable_line(file: Path) -> int:
    """The first line, counted from 1, that is not UTF-8. The text readers decode blocks, so they cannot tell."""
    with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as lines:
        numbered = enumerate(lines, start=1)
        return next(number for number, line in numbered if line.decode("utf-8", errors="ignore").encode() != line)


def refuse_repeated_columns(names: Iterable[str], where: str) -> None:
    """Raise a StageError if a name stands twice, since a row would keep only the last value."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise StageError(f"{where}: the column {repeated[0]!r} stands twice; rename or remove one")


def json_lines(file: Path, _options: FileOptions) -> Iterator[tuple[str, RawRow]]:
    with open_text(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                yield where, parse_object(line, where)


def json_array(file: Path, options: FileOptions) -> Iterator[tuple[str, RawRow]]:
    """A JSON array of objects, perhaps in an object. Many `.json` files hold JSON lines: their first line is a row."""
    with open_text(file) as text:
        first = next((line for line in text if line.strip()), "")
    if first.lstrip().startswith("{") and options.rows_key is None:
        if not is_json(first):
            raise StageError(
                f"{file}: its first line is no JSON object by itself: give JSON lines or an array, or say in rows_key "
                "where in the object the list of rows stands"
            )
        yield from json_lines(file, options)
        return
    with open_text(file) as text:
        content = text.read()
    if not content.strip():
        return
    rows = parse_json(content, str(file), names_line=False)
    for key in options.rows_key.split(".") if options.rows_key else ():
        if not isinstance(rows, dict) or key not in rows:
            found = ", ".join(rows) if isinstance(rows, dict) else type(rows).__name__
            raise StageError(f"{file}: rows_key {options.rows_key}: expected an object with {key!r}, found {found}")
        rows = rows[key]
    if not isinstance(rows, list):
        raise StageError(f"{file}: expected an array of objects, found {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise StageError(f"{file}, row {number}: expected a JSON object, found {type(row).__name__}")
        yield f"{file}, row {number}", row


def is_json(text: str) -> bool:
    """True if a text is one JSON value that says one thing, or would be but for what the reader of lines tells."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    except (RecursionError, ValueError):
        return True
    return True


def csv_rows(file: Path, options: FileOptions) -> Iterator[tuple[str, RawRow]]:
    """Rows of a CSV file with a header; every value is text."""
    csv.field_size_limit(sys.maxsize)
    delimiter = options.delimiter or delimiter_of(file)
    with open_text(file) as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            refuse_repeated_columns(reader.fieldnames or (), f"{file}, line 1")
            for row in reader:
                where = f"{file}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise StageError(f"{where}: expected {len(reader.fieldnames or ())} fields, as in the header")
                yield where, row
        except csv.Error as error:
            raise StageError(f"{file}, line {reader.reader.line_num}: not valid CSV ({error})") from None


def delimiter_of(file: Path) -> str:
    """The only delimiter that parts a CSV file's header. Raises a StageError if there are several."""
    found = {}
    for delimiter, name in DELIMITERS.items():
        with open_text(file) as lines:
            try:
                header = next(csv.reader(lines, delimiter=delimiter, strict=True), [])
            except csv.Error:
                continue
        if len(header) > 1 and not any('"' in name for name in header):  # else it parts what stands in quotes
            found[delimiter] = name
    if len(found) > 1:
        raise StageError(f"{file}, line 1: the header has {' and '.join(found.values())}: say in delimiter which parts")
    delimiter = next(iter(found), ",")
    if delimiter != ",":
        tell_once(one_line(f"{file}: by its header, fields are parted by {found[delimiter]}"))
    return delimiter


def tsv_rows(file: Path, options: FileOptions) -> Iterator[tuple[str, RawRow]]:
    return csv_rows(file, options._replace(delimiter=options.delimiter or "\t"))


def parquet_rows(file: Path, _options: FileOptions) -> Iterator[tuple[str, RawRow]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    with file.open("rb") as content:
        try:
            with pyarrow.parquet.ParquetFile(content) as table:
                for batch in table.iter_batches(batch_size=ROWS_OF_A_BATCH):
                    for row in arrow_rows(batch, str(file), number):
                        number += 1
                        yield f"{file}, row {number}", row
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise StageError(f"{file}: not a Parquet file that can be read ({error})") from None


def arrow_rows(table: "pyarrow.RecordBatch | pyarrow.Table", where: str, before: int) -> list[RawRow]:
    """The rows of a piece of a table of which `before` rows came before.

    Raises:
        StageError: two columns have one name, or a value cannot be a Python value (row and column are named), such as
            text that is not UTF-8 or a date beyond the year 9999.
    """
    refuse_repeated_columns(table.schema.names, where)
    try:
        return table.to_pylist()
    except VALUE_ERRORS:
        pass
    for name, column in zip(table.schema.names, table.columns, strict=True):
        for number, value in enumerate(column, start=before + 1):
            try:
                value.as_py()
            except VALUE_ERRORS as error:
                raise StageError(f"{where}, row {number}, column {name!r}: not a value of use ({error})") from None
    raise AssertionError("each value can be read, and all of them cannot")


# What Arrow raises for a value that it holds and Python cannot: see `arrow_rows`.
VALUE_ERRORS = (ValueError, ArithmeticError, RecursionError)

FileReader = Callable[[Path, FileOptions], Iterator[tuple[str, RawRow]]]
FILE_READERS: dict[str, FileReader] = {
    ".jsonl": json_lines,
    ".jsonl.gz": json_lines,
    ".json": json_array,
    ".json.gz": json_array,
    ".csv": csv_rows,
    ".csv.gz": csv_rows,
    ".tsv": tsv_rows,
    ".tsv.gz": tsv_rows,
    ".parquet": parquet_rows,
}
