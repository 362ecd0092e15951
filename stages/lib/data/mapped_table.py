"""The rows of an Arrow table that stays on disk; what is read of it becomes Python values.

What `datasets.Dataset` offers of this takes a second to import.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from operator import index
from pathlib import Path
from typing import Any, overload

import pyarrow as pa

PlacesOfRows = slice | Iterable[int]


class MappedTable:
    """`table[i]` is a row as a dict, `table[[3, 1]]` or `table[:8]` columns of rows as a dict of lists."""

    def __init__(self, data: pa.Table) -> None:
        self.data = data
        self._batches = data.to_batches()
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))

    @classmethod
    def open(cls, path: Path) -> "MappedTable":
        """Map a file of the Arrow stream format. Raises pa.ArrowException or OSError if it is none."""
        stream = pa.ipc.open_stream(pa.memory_map(str(path)))
        return cls(pa.Table.from_batches(list(stream), stream.schema))

    @property
    def column_names(self) -> list[str]:
        return self.data.column_names

    def select_columns(self, names: Sequence[str]) -> "MappedTable":
        return MappedTable(self.data.select(names))

    def __len__(self) -> int:
        return self.data.num_rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches:
            yield from batch.to_pylist()

    @overload
    def __getitem__(self, key: str) -> "Column": ...
    @overload
    def __getitem__(self, key: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, key: PlacesOfRows) -> dict[str, list]: ...
    def __getitem__(self, key: str | int | PlacesOfRows) -> Any:
        if isinstance(key, str):
            return Column(self.select_columns([key]), key)
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self.data.slice(start, max(0, stop - start)).to_pydict()
            key = range(start, stop, step)
        if isinstance(key, Iterable):
            return pa.Table.from_batches([self._row(one) for one in key], self.data.schema).to_pydict()
        return self._row(key).to_pylist()[0]

    def _row(self, place: int) -> pa.RecordBatch:
        """Of one row. `take` of a table copies all of a column of lists to get at one."""
        found = index(place)
        found += len(self) if found < 0 else 0
        if not 0 <= found < len(self):
            raise IndexError(f"row {place} of {len(self)}")
        batch = bisect_right(self._ends, found)
        return self._batches[batch].slice(found - (self._ends[batch - 1] if batch else 0), 1)


class Column(Sequence):
    """A column: `column[i]` is a value, `column[:8]` and `column[[3, 1]]` lists of them."""

    def __init__(self, table: MappedTable, name: str) -> None:
        self.table, self.name = table, name

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: Any) -> Any:
        return self.table[key][self.name]

    def __iter__(self) -> Iterator[Any]:
        return (row[self.name] for row in self.table)
