"""Token tables: Arrow IPC streams in batches of a fixed size, so the same rows give the same bytes.

They are opened memory mapped, so memory stays flat as rows grow. `row` is the 0-based line of the prepared file that a
table row came from; rows that were dropped leave gaps.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from stages.lib.errors import StageError

if TYPE_CHECKING:
    from datasets import Dataset

BATCH_ROWS = 1000
_IDS = pa.list_(pa.int32())
SFT_SCHEMA = pa.schema([("row", pa.int32()), ("input_ids", _IDS), ("loss_mask", pa.list_(pa.bool_()))])
PREFERENCE_SCHEMA = pa.schema(
    [("row", pa.int32()), ("prompt_ids", _IDS), ("chosen_ids", _IDS), ("rejected_ids", _IDS), ("margin", pa.float32())]
)
PROMPT_SCHEMA = pa.schema([("row", pa.int32()), ("prompt_ids", _IDS)])
REFERENCE_SCHEMA = pa.schema(
    [("row", pa.int32()), ("reference_chosen_logps", pa.float32()), ("reference_rejected_logps", pa.float32())]
)


class TableWriter:
    """Writes rows to a table as they come, holding one batch of them at a time."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.schema = schema
        self.rows = 0
        self._batch: list[Mapping[str, Any]] = []
        self._file = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._file, schema)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row: a value for each column of the schema."""
        self._batch.append(row)
        self.rows += 1
        if len(self._batch) == BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        arrays = [pa.array([row[field.name] for row in self._batch], field.type) for field in self.schema]
        self._stream.write_batch(pa.record_batch(arrays, schema=self.schema))
        self._batch.clear()

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._batch:
            self._flush()
        self._stream.close()
        self._file.close()


def write_table(path: Path, columns: Mapping[str, Sequence[Any]], schema: pa.Schema) -> None:
    """Write a whole table: one sequence of equal length for each column of `schema`."""
    if set(columns) != set(schema.names):
        raise ValueError(f"columns {sorted(columns)} are not those of the schema: {schema.names}")
    with TableWriter(path, schema) as writer:
        for values in zip(*(columns[name] for name in schema.names), strict=True):
            writer.append(dict(zip(schema.names, values, strict=True)))


def read_table(path: Path, schema: pa.Schema) -> "Dataset":
    """Open a table memory mapped.

    Returns:
        A `datasets.Dataset`: `table[i]` is a dict of Python values, `table["prompt_ids"][i]` a list of ints,
        `table[[3, 1]]` a dict of lists, `len(table)` the number of rows.
    Raises:
        StageError: the file is missing, empty, cut short or no Arrow stream, or its columns are not those of `schema`.
    """
    from datasets import Dataset

    if not path.is_file():
        raise StageError(f"{path} does not exist: expected a token table, as the stage before writes it")
    try:
        table = Dataset.from_file(str(path))
    except (pa.ArrowException, OSError) as error:
        raise StageError(f"{path} is no Arrow stream, or is cut short: {error}; run the stage that writes it") from None
    found = table.data.schema.remove_metadata()
    if not found.equals(schema):
        raise StageError(f"{path}: expected columns {_described(schema)}, found {_described(found)}")
    if len(table) == 0:
        raise StageError(f"{path} holds no rows")
    return table


def read_note(path: Path, name: str) -> str | None:
    """A note that the writer of a table put into its schema's metadata, or None. Raises OSError as opening a file."""
    with pa.memory_map(str(path)) as source:
        metadata = pa.ipc.open_stream(source).schema.metadata or {}
    note = metadata.get(name.encode())
    return None if note is None else note.decode()


def _described(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def check_table_ids(table: "Dataset", columns: Iterable[str], vocab_size: int, path: Path) -> None:
    """Raise a StageError that names `path`, row and id if a token id of `columns` is not in range(vocab_size)."""
    for name in columns:
        for chunk in table.data.column(name).chunks:
            extremes = pc.min_max(chunk.flatten()).as_py()
            if extremes["max"] is not None and (extremes["min"] < 0 or extremes["max"] >= vocab_size):
                _report_foreign_id(table, name, vocab_size, path)


def _report_foreign_id(table: "Dataset", column: str, vocab_size: int, path: Path) -> None:
    for row, ids in zip(table["row"], table[column], strict=True):
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise StageError(
                    f"{path}, row {row}, {column}: token id {token_id} is outside the vocabulary of {vocab_size}; "
                    "tokens and model must come from one models/base: run the tokenize stage again"
                )
