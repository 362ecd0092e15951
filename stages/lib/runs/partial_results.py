"""What a stage without a training loop has computed so far, kept by chunks, so that a kill loses one at most.

    with PartialResults("ref_logprobs", settings, inputs, outs, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        for rows in this_run.chunks(len(table)):
            logps = this_run.keep(f"train-{rows.start}-{rows.stop}", len(rows), COLUMNS, lambda: compute(rows))
        this_run.publish(build)

Chunks are cut by place in the whole table, whatever the number of processes, and all processes compute each of them
together, so that another number of processes can go on.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from stages.lib.command.hashing import value_hash
from stages.lib.operations.stop_signal import StopSignal
from stages.lib.runs.checkpoints import read_json_or_none
from stages.lib.runs.stage_run import StageRun

Value = TypeVar("Value", bound=dict[str, list])


# What a column of a chunk's value may hold for a row.
NUMBER, NUMBER_OR_NULL, NUMBERS = "a number", "a number or null", "numbers"
TOKEN_IDS, SEVERAL_IDS = "token ids", "several lists of token ids"
HOLDS: dict[str, Callable[[Any], bool]] = {
    NUMBER: lambda item: type(item) in (int, float) and math.isfinite(item),
    NUMBER_OR_NULL: lambda item: item is None or HOLDS[NUMBER](item),
    NUMBERS: lambda item: type(item) is list and len(item) > 0 and all(map(HOLDS[NUMBER], item)),
    TOKEN_IDS: lambda item: type(item) is list and len(item) > 0 and all(type(one) is int and one >= 0 for one in item),
    SEVERAL_IDS: lambda item: type(item) is list and all(map(HOLDS[TOKEN_IDS], item)),
}


class PartialResults(StageRun):
    """One run of a stage that computes its result in chunks. A chunk's value is a dict of lists, an item for a row."""

    found = 0  # chunks that an earlier start had kept

    def chunks(self, count: int) -> Iterator[range]:
        """`range(count)` cut into chunks of `runtime.yaml`'s `rows_per_partial_result`."""
        size = self.runtime.rows_per_partial_result
        for start in range(0, count, size):
            yield range(start, min(start + size, count))

    def keep(self, name: str, rows: int, columns: Mapping[str, str], compute: Callable[[], Value]) -> Value:
        """The value of `compute`, which all processes enter together, or the one that an earlier start has kept.

        A signal that comes meanwhile ends the stage once the chunk is kept.

        Args:
            rows: of the chunk.
            columns: the keys of its value → what they hold for a row, of `HOLDS`.
        Raises:
            StageError: the disk is full; the chunks kept before are as they were.
        """
        kept = self.processes.broadcast(self._read(name, rows, columns))
        if kept is not None:
            if not self.found:
                self.say(f"{self.stage}: resuming, goes on from what an earlier start has kept")
            self.found += 1
            return kept
        with StopSignal(self.stage, self.processes, self.runtime.stop_seconds) as stop:
            value = compute()
            self.processes.in_main(lambda: self.own_scratch.keep(f"{name}.json", self._record(value)))
            if stop.agreed():
                stop.leave(f"what it has computed is kept, up to {name}")
        return value

    def keep_all(
        self, name: str, count: int, columns: Mapping[str, str], compute: Callable[[range], Value]
    ) -> dict[str, list]:
        """The columns of `count` rows, kept chunk by chunk; `compute` is given a chunk's rows. Raises as `keep`."""
        whole: dict[str, list] = {column: [] for column in columns}
        for chunk in self.chunks(count):
            value = self.keep(f"{name}-{chunk.start}-{chunk.stop}", len(chunk), columns, partial(compute, chunk))
            for column, items in value.items():
                whole[column] += items
        return whole

    def _record(self, value: Value) -> bytes:
        # JSON gives every finite float back to the last bit.
        return json.dumps({"code": self.own_scratch.code, "sha256": value_hash(value), "value": value}).encode()

    def _read(self, name: str, rows: int, columns: Mapping[str, str]) -> Any:
        path = self.scratch.kept / f"{name}.json" if self.scratch else None
        if path is None or not path.exists():
            return None
        record = _record_in(path)
        if record is None or not _is_chunk(record["value"], rows, columns):
            print(f"warning: {path} is damaged (its checksum differs); computing it again", file=sys.stderr)
            return None
        if record["code"] == self.own_scratch.code or self.runtime.resume_across_code_change:
            return record["value"]
        self.say(f"note: {path} was made by other code (runtime.yaml: resume_across_code_change) and is not used")
        return None


def _record_in(path: Path) -> dict[str, Any] | None:
    """A record with `code` and `value`, or None if it is damaged."""
    try:
        record = read_json_or_none(path) if path.is_file() else None
        if not isinstance(record, dict) or not {"code", "sha256", "value"} <= record.keys():
            return None
        return record if value_hash(record["value"]) == record["sha256"] else None
    except (OSError, RecursionError):
        return None


def _is_chunk(value: Any, rows: int, columns: Mapping[str, str]) -> bool:
    """Whether it has these columns, with as many items."""
    if not isinstance(value, dict) or value.keys() != columns.keys():
        return False
    return all(
        isinstance(value[name], list) and len(value[name]) == rows and all(map(HOLDS[kind], value[name]))
        for name, kind in columns.items()
    )
