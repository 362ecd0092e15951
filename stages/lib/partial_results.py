"""What a stage without a training loop has computed so far, kept by chunks, so that a kill loses one at most.

    with PartialResults("ref_logprobs", settings, inputs, outs, runtime, processes) as this_run:
        if this_run.already_complete():
            return
        for rows in this_run.chunks(len(table)):
            logps = this_run.keep(f"train-{rows.start}-{rows.stop}", lambda: compute(rows))
        this_run.publish(build)

Chunks are cut by place in the whole table, whatever the number of processes, and all processes compute each of them
together, so that another number of processes can go on.
"""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from stages.lib.hashing import value_hash
from stages.lib.stage_run import StageRun
from stages.lib.stop_signal import StopSignal

Value = TypeVar("Value", bound=dict[str, list])


class PartialResults(StageRun):
    """One run of a stage that computes its result in chunks. A chunk's value is a dict of lists of numbers."""

    found = 0  # chunks that an earlier start had kept

    def chunks(self, count: int) -> Iterator[range]:
        """`range(count)` cut into chunks of `runtime.yaml`'s `rows_per_partial_result`."""
        size = self.runtime.rows_per_partial_result
        for start in range(0, count, size):
            yield range(start, min(start + size, count))

    def keep(self, name: str, compute: Callable[[], Value]) -> Value:
        """The value of `compute`, which all processes enter together, or the one that an earlier start has kept.

        A signal that comes meanwhile ends the stage once the chunk is kept.

        Raises:
            StageError: the disk is full; the chunks kept before are as they were.
        """
        kept = self.processes.broadcast(self._read(name))
        if kept is not None:
            if not self.found:
                self.say(f"{self.stage}: resuming, goes on from what an earlier start has kept")
            self.found += 1
            return kept
        with StopSignal(self.stage, self.processes, self.runtime.stop_seconds) as stop:
            value = compute()
            self.processes.in_main(lambda: self.scratch.keep(f"{name}.json", self._record(value)))
            if stop.agreed():
                stop.leave(f"what it has computed is kept, up to {name}")
        return value

    def _record(self, value: Value) -> bytes:
        # JSON gives every finite float back to the last bit.
        return json.dumps({"code": self.scratch.code, "sha256": value_hash(value), "value": value}).encode()

    def _read(self, name: str) -> Any:
        path = self.scratch.kept / f"{name}.json" if self.scratch else None
        if path is None or not path.exists():
            return None
        try:
            record = json.loads(path.read_bytes())
            code, value, whole = record["code"], record["value"], value_hash(record["value"]) == record["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            print(f"warning: {path} is damaged (its checksum differs); computing it again", file=sys.stderr)
            return None
        if code == self.scratch.code or self.runtime.resume_across_code_change:
            return value
        self.say(f"note: {path} was made by other code (runtime.yaml: resume_across_code_change) and is not used")
        return None
