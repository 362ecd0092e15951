"""Rows and columns of a table on disk, as Python values, whatever batches they lie in."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from stages.lib.data.mapped_table import MappedTable

IDS = [[place] * (place % 3 + 1) for place in range(7)]
ROWS = [{"row": 2 * place, "ids": IDS[place]} for place in range(7)]


@pytest.fixture
def table(tmp_path: Path) -> MappedTable:
    """Seven rows in batches of three, none, and four."""
    path = tmp_path / "t.arrow"
    whole = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, whole.schema) as stream:
        for start, stop in ((0, 3), (3, 3), (3, 7)):
            stream.write_batch(
                whole.slice(start, stop - start).combine_chunks().to_batches()[0]
                if stop > start
                else pa.RecordBatch.from_pylist([], whole.schema)
            )
    return MappedTable.open(path)


def test_rows(table: MappedTable) -> None:
    assert len(table) == 7
    assert [*table] == ROWS
    assert [table[place] for place in range(7)] == ROWS
    assert table[-1] == ROWS[6]
    for place in (7, -8):
        with pytest.raises(IndexError, match=f"row {place} of 7"):
            table[place]


@pytest.mark.parametrize(
    "key", [slice(None), slice(2, 5), slice(5, 2), slice(-2, None), slice(6, None, -2), [3, 0, 3], range(2, 4), []]
)
def test_columns_of_rows(table: MappedTable, key: slice | list[int] | range) -> None:
    wanted = ROWS[key] if isinstance(key, slice) else [ROWS[place] for place in key]
    expected = {name: [row[name] for row in wanted] for name in ("row", "ids")}
    assert table[key] == expected
    assert table["ids"][key] == expected["ids"]
    if not isinstance(key, slice):
        assert table[np.array([*key], dtype=np.int64)] == expected


def test_a_column_alone(table: MappedTable) -> None:
    ids = table["ids"]
    assert (len(ids), ids[4], [*ids]) == (7, IDS[4], IDS)
    alone = table.select_columns(["row"])
    assert alone.column_names == ["row"]
    assert alone[:2] == {"row": [0, 2]}
