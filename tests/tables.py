"""Tables that tests change or read."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.lib.data.reference_tables import TOKEN_LOG_PROBS, VALUES, values_digest
from stages.lib.data.token_tables import read_table, write_table

Columns = dict[str, list]


def rewrite(path: Path, schema: pa.Schema, changed: Callable[[Columns], Columns], *, keep_digest: bool = False) -> None:
    """Change the columns of a table and leave its notes as they are, but for the digest of values where that fits."""
    with pa.memory_map(str(path)) as source:
        notes = pa.ipc.open_stream(source).schema.metadata
    columns = changed(read_table(path, schema)[:])
    if VALUES.encode() in (notes or {}) and not keep_digest:
        values = {name: column for name, column in columns.items() if name != "row"}
        flat = [[*chain(*column)] if name in TOKEN_LOG_PROBS else column for name, column in values.items()]
        notes = {**notes, VALUES.encode(): values_digest(*flat).encode()}
    path.unlink()
    write_table(path, columns, schema.with_metadata(notes))


def rollout_rows(folder: Path, name: str, table: str = "rollouts") -> list[dict[str, Any]]:
    """What a policy of a project folder wrote while it was trained; each column without a value is left out."""
    found = pq.read_table(folder / f"data/rollouts/{name}/{table}.parquet").to_pylist()
    return [{key: value for key, value in row.items() if value is not None} for row in found]
