"""Token tables made shard by shard, on several processes, in one order: a shard is so many lines of a prepared file.

What a shard holds depends on its lines alone, so the bytes of a table do not depend on how many processes make it, nor
on which shards an earlier start had kept. Workers are forked: they share what this process has loaded, read their lines
themselves, and end with it.
"""

import gc
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import islice, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import dvc_hash
from stages.lib.command.jsonl import parse_object
from stages.lib.data.chat import RefusedRowError
from stages.lib.data.conversation_rows import Conversation
from stages.lib.data.encoding import decode
from stages.lib.data.prepared_rows import Kind
from stages.lib.data.row_errors import UnusableRowError
from stages.lib.data.token_rows import (
    ENCODINGS,
    Counts,
    EncodedRow,
    OverBudgetError,
    encode_batches,
    first_tokens,
    within_budget,
)
from stages.lib.data.token_tables import TOKENIZER_NOTE, batch_of, check_batch_fits
from stages.lib.models.model_facts import ModelFacts
from stages.lib.settings.tokenize_data import Tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_ROWS = 1000
ROWS_WORTH_A_WORKER = 2000  # fewer are encoded in less time than a worker takes to start
ROWS_AT_ONCE = 250  # rendered in one message, encoded in one call
NumberedRow = tuple[int, str, Conversation]  # with its 0-based line and its place


class Shard(NamedTuple):
    """Some lines of a prepared file."""

    path: Path
    first_row: int
    offset: int  # of its first line in the file, in bytes
    rows: int


def row_shards(path: Path, *, may_be_empty: bool = False) -> list[Shard]:
    """Cut a prepared file into shards. Raises StageError if it is missing or, unless it may be, empty."""
    if not path.is_file():
        raise StageError(f"{path} does not exist")
    shards, offset, start, row = [], 0, 0, -1
    with path.open("rb") as lines:
        for row, line in enumerate(lines):
            if row % SHARD_ROWS == 0 and row:
                shards.append(Shard(path, row - SHARD_ROWS, start, SHARD_ROWS))
                start = offset
            offset += len(line)
    if row < 0 and may_be_empty:
        return []
    if row < 0:
        raise StageError(f"{path} is empty: expected one JSON object a line")
    first = len(shards) * SHARD_ROWS
    return [*shards, Shard(path, first, start, row + 1 - first)]


@dataclass(frozen=True)
class ShardEncoder:
    """Makes a shard's part of a table."""

    tokenizer: "PreTrainedTokenizerBase"
    tokenizer_hash: str
    kind: Kind
    settings: Tokenize
    seed: int
    model: ModelFacts

    def schema_of(self, path: Path) -> pa.Schema:
        """The schema of the table of a prepared file, with notes on what it is made of."""
        notes = {TOKENIZER_NOTE: self.tokenizer_hash, "rows": dvc_hash(path)}
        return ENCODINGS[self.kind].schema.with_metadata(notes)

    def __call__(self, shard: Shard) -> bytes:
        """The shard as a JSON line of its counts, and an Arrow stream of its rows.

        Raises StageError, for the first row that cannot be used, with the row's place.
        """
        counts, table = Counts(), list[dict[str, Any]]()
        faults: list[StageError] = []
        for_encoding, for_counting = tee(self._batches(shard, faults))
        batches = ([row for _, _, row in rows] for rows in for_encoding)
        encoded = encode_batches(self.tokenizer, self.kind, batches, self.settings)
        for rows, results in zip(for_counting, encoded, strict=True):
            table += self._counted(rows, results, counts)
        if faults:
            raise faults[0]
        schema = ENCODINGS[self.kind].schema
        batch = batch_of(table, schema)
        check_batch_fits(batch, self.model, shard.path)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as stream:
            stream.write_batch(batch)
        return json.dumps(vars(counts)).encode() + b"\n" + sink.getvalue().to_pybytes()

    def _batches(self, shard: Shard, faults: list[StageError]) -> Iterator[list[NumberedRow]]:
        """The rows before the first line that cannot be used. The error of that goes into `faults`."""
        numbered = self._read(shard)
        more = True
        while more:
            rows: list[NumberedRow] = []
            try:
                for row in islice(numbered, ROWS_AT_ONCE):
                    rows.append(row)
            except StageError as error:
                faults.append(error)
            more = len(rows) == ROWS_AT_ONCE
            if rows:
                yield rows

    def _read(self, shard: Shard) -> Iterator[NumberedRow]:
        with shard.path.open("rb") as lines:
            lines.seek(shard.offset)
            for number, line in enumerate(islice(lines, shard.rows), shard.first_row):
                where = f"{shard.path}, line {number + 1}"
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    raise StageError(f"{where}: not UTF-8 text ({error.reason})") from None
                yield number, where, ENCODINGS[self.kind].read(parse_object(text, where), where)

    def _counted(
        self, rows: list[NumberedRow], results: list[EncodedRow | UnusableRowError | StageError], counts: Counts
    ) -> Iterator[dict[str, Any]]:
        for (number, where, row), result in zip(rows, results, strict=True):
            try:
                fitting = self._fitting(result, number, where, row)
                columns = ENCODINGS[self.kind].columns(fitting, row)
            except UnusableRowError as error:
                counts.dropped[error.args[0]] += 1
                continue
            counts.add_row(fitting, columns)
            counts.plain_texts += row.text is not None
            yield {"row": number, **columns, "source": row.source}

    def _fitting(
        self, result: EncodedRow | UnusableRowError | StageError, number: int, where: str, row: Conversation
    ) -> EncodedRow:
        """The row within its budgets. Raises StageError with its place, or UnusableRowError where it is to be dropped.

        What the template refuses is the latter with `on_unusable_row: drop`.
        """
        if isinstance(result, RefusedRowError):
            if self.settings.on_unusable_row == "drop":
                raise UnusableRowError(result.reason)
            raise StageError(
                f"{where}: {result}; mend the row or the chat template, or set tokenize_data.on_unusable_row: drop"
            )
        if isinstance(result, StageError):
            raise StageError(f"{where}: {result}")
        if isinstance(result, UnusableRowError):
            raise result
        whole, bounds = result.prompt, self.settings.text_prompt_tokens
        if self.kind == "prompts" and row.text is not None and bounds is not None:
            result = result._replace(prompt=first_tokens(whole, bounds, self.seed, row.source, number, result.bos))
        try:
            fitting = within_budget(result, self.settings)
        except OverBudgetError as error:
            reason, key, found = error.args
            if self.settings.truncation != "error":
                raise UnusableRowError(reason) from None
            raise StageError(
                f"{where}: {found}; raise tokenize_data.{key} or set tokenize_data.truncation: drop, keep_end or "
                "keep_start"
            ) from None
        if len(fitting.prompt) == len(whole):
            return fitting
        return fitting._replace(kept_text=decode(self.tokenizer, fitting.prompt[fitting.bos :]))


def read_shard(payload: bytes) -> tuple[Counts, list[pa.RecordBatch]]:
    """The counts and rows of what a ShardEncoder made."""
    line, _, table = payload.partition(b"\n")
    counts = Counts(**json.loads(line))
    counts.dropped = Counter(counts.dropped)
    with pa.ipc.open_stream(pa.py_buffer(table)) as stream:
        return counts, [batch for batch in stream if batch.num_rows]


def workers_for(shards: Sequence[Shard], most: int) -> int:
    """How many processes to encode shards on, of the `most` that there may be."""
    return max(1, min(most, sum(shard.rows for shard in shards) // ROWS_WORTH_A_WORKER))


def encoded_shards(
    encoder: Callable[[Shard], bytes],
    shards: Sequence[Shard],
    workers: int,
    kept: Callable[[Shard], bytes | None],
    keep: Callable[[Shard, bytes], None],
) -> Generator[bytes, None, None]:
    """What each shard encodes to, in order, made by up to `workers` processes.

    Args:
        kept: what an earlier start has made of a shard, if it has.
        keep: gets what is made now.
    Raises:
        StageError: of the first shard, in order, that has a faulty row; or a worker was killed.
    """
    missing = [shard for shard in shards if kept(shard) is None]
    workers = workers_for(missing, workers)
    made = _made_here(encoder, missing) if workers == 1 else _made_by_workers(encoder, missing, workers)
    gc.freeze()  # what is loaded stays: looking through it at each collection would take an eighth of the time
    try:
        yield from _in_order(shards, missing, made, kept, keep)
    finally:
        made.close()
        gc.unfreeze()


def _in_order(
    shards: Sequence[Shard],
    missing: Sequence[Shard],
    made: Iterable[bytes],
    kept: Callable[[Shard], bytes | None],
    keep: Callable[[Shard, bytes], None],
) -> Generator[bytes, None, None]:
    new, following = set(missing), iter(made)
    for shard in shards:
        payload = next(following) if shard in new else kept(shard)
        assert payload is not None, "what was kept a moment ago"
        if shard in new:
            keep(shard, payload)
        yield payload


def _made_here(encoder: Callable[[Shard], bytes], shards: Sequence[Shard]) -> Generator[bytes, None, None]:
    for shard in shards:
        yield encoder(shard)


def _made_by_workers(
    encoder: Callable[[Shard], bytes], shards: Sequence[Shard], workers: int
) -> Generator[bytes, None, None]:
    """Results in order, with no more than two shards for each worker given out at a time."""
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), initializer=_begin_worker, initargs=(encoder, os.getpid())
    )
    waiting: deque[Future[bytes]] = deque()
    try:
        for shard in shards:
            waiting.append(pool.submit(_encode_in_worker, shard))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise StageError(
            "a process that encodes rows was ended from outside, as the system does when memory runs out: give "
            "runtime.yaml: tokenize_data.workers a smaller number"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_encoder: Callable[[Shard], bytes] | None = None  # of a worker


def _begin_worker(encoder: Callable[[Shard], bytes], parent: int) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    signal.set_wakeup_fd(-1)  # the pipe of the parent's watch over signals
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends the pool
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=partial(_end_with, parent), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process once the one that made it is gone, whatever ended that."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _encode_in_worker(shard: Shard) -> bytes:
    assert _worker_encoder is not None
    try:
        return _worker_encoder(shard)
    except StageError as error:
        raise StageError(str(error)) from None  # a subclass may not survive the way to the parent
