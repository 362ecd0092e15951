"""Token tables: Arrow IPC streams in batches of a fixed size, so the same rows give the same bytes.

They are opened memory mapped, so memory stays flat as rows grow. `row` is the 0-based line of the prepared file that a
table row came from; rows that were dropped leave gaps. A table is checked whole where it is opened, by column.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.lib.command.errors import StageError
from stages.lib.data.mapped_table import MappedTable
from stages.lib.data.prompts import facts_in, messages_in_cell

if TYPE_CHECKING:
    from stages.lib.models.model_facts import ModelFacts

BATCH_ROWS = 1000
TOKENIZER_NOTE = "tokenizer"  # of the schema's metadata: the hash of the tokenizer that made the ids
RUN_AGAIN = "run the stage that writes it again"
_IDS = pa.list_(pa.int32())
_SOURCE = ("source", pa.string())
SFT_SCHEMA = pa.schema(
    [
        ("row", pa.int32()),
        ("input_ids", _IDS),
        ("loss_mask", pa.list_(pa.bool_())),
        ("messages", pa.string()),  # and context: of the prompt, as in the table of prompts
        ("context", pa.string()),
        _SOURCE,
    ]
)
PREFERENCE_SCHEMA = pa.schema(
    [
        ("row", pa.int32()),
        ("prompt_ids", _IDS),
        ("chosen_ids", _IDS),
        ("rejected_ids", _IDS),
        ("margin", pa.float32()),
        _SOURCE,
    ]
)
UNPAIRED_SCHEMA = pa.schema(
    [
        ("row", pa.int32()),
        ("prompt_ids", _IDS),
        ("completion_ids", _IDS),
        ("label", pa.bool_()),
        ("score", pa.float32()),  # null where the label was made of none
        ("mismatched_ids", _IDS),  # a reply to another prompt, or null (`mismatched_replies`)
        _SOURCE,
    ]
)
PROMPT_SCHEMA = pa.schema(
    [
        ("row", pa.int32()),
        ("prompt_ids", _IDS),
        ("messages", pa.string()),
        ("facts", pa.string()),
        ("context", pa.string()),
        _SOURCE,
    ]
)
REFERENCE_SCHEMA = pa.schema(
    [("row", pa.int32()), ("reference_chosen_logps", pa.float32()), ("reference_rejected_logps", pa.float32())]
)
UNPAIRED_REFERENCE_SCHEMA = pa.schema(
    [("row", pa.int32()), ("reference_logps", pa.float32()), ("reference_mismatched_logps", pa.float32())]
)
_TOKEN_LOGPS = pa.list_(pa.float32())
TOKEN_REFERENCE_SCHEMA = pa.schema(
    [
        *REFERENCE_SCHEMA,
        ("reference_chosen_token_logps", _TOKEN_LOGPS),
        ("reference_rejected_token_logps", _TOKEN_LOGPS),
    ]
)


def batch_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Rows as one batch: a value for each column of the schema in each."""
    arrays = [_column([row[field.name] for row in rows], field.type) for field in schema]
    return pa.record_batch(arrays, schema=schema)


def _column(values: Sequence[Any], of_type: pa.DataType) -> pa.Array:
    if of_type != _IDS:
        return pa.array(values, of_type)
    # Millions of ids: pyarrow takes eight times as long for lists of Python's numbers as for one array of C's.
    try:
        ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
        flat = np.asarray(array("i", chain.from_iterable(values)))
    except TypeError:  # a list, or a value of one, is null
        return pa.array(values, of_type)
    return pa.ListArray.from_arrays(ends, flat, of_type)


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
        self._stream.write_batch(batch_of(self._batch, self.schema))
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
    write_table_rows(
        path,
        (
            dict(zip(schema.names, values, strict=True))
            for values in zip(*(columns[name] for name in schema.names), strict=True)
        ),
        schema,
    )


def write_table_rows(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """The same of rows, each with a value for each column."""
    with TableWriter(path, schema) as writer:
        for row in rows:
            writer.append(row)


def read_table(path: Path, schema: pa.Schema) -> MappedTable:
    """Open a table memory mapped.

    Returns:
        `table[i]` is a dict of Python values, `table["prompt_ids"][i]` a list of ints, `table[[3, 1]]` a dict of lists.
    Raises:
        StageError: the file is missing, empty, cut short or not an Arrow stream, its columns are not those of
            `schema`, or a row holds what no stage writes (row and column are named).
    """
    stream = _schema_of(path)
    found = stream.remove_metadata()
    if not found.equals(schema):
        raise StageError(f"{path}: expected columns {_described(schema)}, found {_described(found)}; {RUN_AGAIN}")
    with _as_arrow(path):
        table = MappedTable.open(path)
        table.data.validate(full=True)
    if len(table) == 0:
        raise StageError(f"{path} holds no rows")
    _check_rows(table.data, path)
    return table


def read_note(path: Path, name: str) -> str | None:
    """A note that the writer of a table put into its schema's metadata, or None. Raises StageError as `read_table`."""
    note = (_schema_of(path).metadata or {}).get(name.encode())
    try:
        return None if note is None else note.decode()
    except UnicodeDecodeError as error:
        raise StageError(f"{path}: its note '{name}' is not UTF-8 text ({error.reason}); {RUN_AGAIN}") from None


def has_column(path: Path, name: str) -> bool:
    """Whether a table has a column of this name. Raises StageError as `read_table`."""
    return name in _schema_of(path).names


def _schema_of(path: Path) -> pa.Schema:
    if not path.is_file():
        raise StageError(f"{path} does not exist: expected a token table, as the stage before writes it")
    with _as_arrow(path), pa.memory_map(str(path)) as source:
        return pa.ipc.open_stream(source).schema


@contextmanager
def _as_arrow(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise StageError(f"{path} is not an Arrow stream, or is cut short: {error}; {RUN_AGAIN}") from None


def _check_rows(table: pa.Table, path: Path) -> None:
    """Raise a StageError that names the first row and column with a value that no stage writes, if there is one."""
    before = -1
    for batch in table.to_batches():
        rows = batch["row"]
        previous = pa.concat_arrays([pa.array([before], pa.int32()), rows[:-1]])
        _refuse(pc.is_null(rows), "row is null", path, "row")
        _refuse(pc.less_equal(rows, previous), "row numbers must be 0 or more, and grow", path, "row")
        before = rows[-1].as_py()
        for name in batch.schema.names:
            for fault, faulty in COLUMN_CHECKS.get(name, ()):
                _refuse(faulty(batch[name]), fault, path, name, rows)
            if name in TEXTS:
                _check_texts(batch[name], path, name, rows)
        if "loss_mask" in batch.schema.names:
            for fault, faulty in MASK_CHECKS:
                _refuse(faulty(batch["loss_mask"], batch["input_ids"]), fault, path, "loss_mask", rows)


def _refuse(faulty: pa.Array, fault: str, path: Path, column: str, rows: pa.Array | None = None) -> None:
    first = pc.index(faulty, True).as_py()
    if first >= 0:
        row = f", row {rows[first].as_py()}" if rows else ""
        raise StageError(f"{path}{row}, {column}: {fault}; {RUN_AGAIN}")


def _check_texts(texts: pa.Array, path: Path, column: str, rows: pa.Array) -> None:
    for row, text in zip(rows.to_pylist(), texts.to_pylist(), strict=True):
        try:
            TEXTS[column](text, f"{path}, row {row}, {column}")
        except StageError as error:
            raise StageError(f"{error}; {RUN_AGAIN}") from None


def _holds_null(lists: pa.ListArray) -> pa.Array:
    """For each list whether it holds a null. The lists themselves are not null."""
    values = lists.flatten()
    if not values.null_count:
        return pa.repeat(False, len(lists))
    return pc.is_in(_indices(lists), value_set=pc.list_parent_indices(lists).filter(pc.is_null(values)))


def _is_all_false(mask: pa.ListArray, _ids: pa.ListArray) -> pa.Array:
    return pc.invert(pc.is_in(_indices(mask), value_set=pc.list_parent_indices(mask).filter(mask.flatten())))


def _indices(lists: pa.ListArray) -> pa.Array:
    return pa.array(range(len(lists)), pa.int64())


def _of_any_item(faulty: Callable[[pa.Array], pa.Array]) -> Callable[[pa.ListArray], pa.Array]:
    """For each list whether one of its items is faulty."""

    def check(lists: pa.ListArray) -> pa.Array:
        return pc.is_in(_indices(lists), value_set=pc.list_parent_indices(lists).filter(faulty(lists.flatten())))

    return check


Check = Callable[[pa.Array], pa.Array]
LIST_CHECKS: tuple[tuple[str, Check], ...] = (
    ("the list is null", pc.is_null),
    ("the list is empty", lambda lists: pc.equal(pc.list_value_length(lists), 0)),
    ("the list holds a null", _holds_null),
)
LOGP_CHECKS: tuple[tuple[str, Check], ...] = (
    ("the log-prob is null", pc.is_null),
    ("the log-prob is not a finite number", lambda logps: pc.invert(pc.is_finite(logps))),
    ("the log-prob is above 0", lambda logps: pc.greater(logps, 0)),
)
TOKEN_LOGP_CHECKS: tuple[tuple[str, Check], ...] = (
    *LIST_CHECKS,
    *((f"{fault} (of a token)", _of_any_item(faulty)) for fault, faulty in LOGP_CHECKS[1:]),
)
MARGIN_CHECKS: tuple[tuple[str, Check], ...] = (
    (
        "the margin is not a finite number of at least 0",
        lambda margins: pc.fill_null(pc.or_(pc.invert(pc.is_finite(margins)), pc.less(margins, 0)), False),
    ),
)
SCORE_CHECKS: tuple[tuple[str, Check], ...] = (
    ("the score is not a finite number", lambda scores: pc.fill_null(pc.invert(pc.is_finite(scores)), False)),
)
# What is wrong with a value of a column → for each row whether it is. A check may take for granted what comes before.
COLUMN_CHECKS: dict[str, tuple[tuple[str, Check], ...]] = {
    **dict.fromkeys(
        ("input_ids", "loss_mask", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids"), LIST_CHECKS
    ),
    **dict.fromkeys(("reference_chosen_logps", "reference_rejected_logps", "reference_logps"), LOGP_CHECKS),
    "reference_mismatched_logps": LOGP_CHECKS[1:],
    **dict.fromkeys(("reference_chosen_token_logps", "reference_rejected_token_logps"), TOKEN_LOGP_CHECKS),
    "mismatched_ids": LIST_CHECKS[1:],
    "margin": MARGIN_CHECKS,
    "label": (("the label is null", pc.is_null),),
    "score": SCORE_CHECKS,
    **dict.fromkeys(("messages", "facts", "context", "source"), (("the text is null", pc.is_null),)),
}
# Columns of text → what reads a cell, or raises a StageError that begins with the place it is given.
TEXTS: dict[str, Callable[[str, str], Any]] = {
    "messages": messages_in_cell,
    "facts": facts_in,
    "context": facts_in,
}
MASK_CHECKS: tuple[tuple[str, Callable[[pa.ListArray, pa.ListArray], pa.Array]], ...] = (
    (
        "the mask has another length than input_ids",
        lambda mask, ids: pc.not_equal(pc.list_value_length(mask), pc.list_value_length(ids)),
    ),
    ("the mask is false everywhere: the row has nothing to learn from", _is_all_false),
    ("the mask is true at the first token, which no token predicts", lambda mask, _ids: pc.list_element(mask, 0)),
)


def _described(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def check_table_fits(table: MappedTable, facts: "ModelFacts", path: Path) -> None:
    """Raise a StageError that names `path` and row unless a model has every token id of a table, and room for its rows.

    A row takes the positions of its prompt and its longest reply.
    """
    for batch in table.data.to_batches():
        check_batch_fits(batch, facts, path)


def check_batch_fits(batch: pa.RecordBatch, facts: "ModelFacts", path: Path) -> None:
    """The same of some of its rows."""
    id_columns = [name for name in batch.schema.names if name.endswith("_ids")]
    vocab_size = facts.vocab_size or 0
    for name in id_columns:
        extremes = pc.min_max(batch[name].flatten()).as_py()
        if extremes["max"] is not None and (extremes["min"] < 0 or extremes["max"] >= vocab_size):
            _report_foreign_id(batch, name, vocab_size, path)
    first, *replies = (pc.list_value_length(batch[name]) for name in id_columns)
    lengths = pc.add(first, pc.max_element_wise(*replies)) if replies else first
    if facts.positions is not None and batch.num_rows and pc.max(lengths).as_py() > facts.positions:
        place = pc.index(pc.greater(lengths, facts.positions), True).as_py()
        raise StageError(
            f"{path}, row {batch['row'][place]}: {lengths[place]} tokens are more than the model's {facts.positions} "
            "positions; tokens and model must come from one models/base: run the stage tokenize_data again"
        )


def _report_foreign_id(batch: pa.RecordBatch, column: str, vocab_size: int, path: Path) -> None:
    for row, ids in zip(batch["row"].to_pylist(), batch[column].to_pylist(), strict=True):
        for token_id in ids or ():
            if not 0 <= token_id < vocab_size:
                raise StageError(
                    f"{path}, row {row}, {column}: token id {token_id} is outside the vocabulary of {vocab_size}; "
                    "tokens and model must come from one models/base: run the stage tokenize_data again"
                )
