"""Encode prepared rows once into token tables that every later stage reads.

Prompt and reply are encoded apart and joined as ids (`stages.lib.data.chat`): masks come from lengths, a reply ends in
exactly one EOS, and the ids are checked to decode to the text. Rows that cannot be encoded so are dropped and counted;
with `on_unusable_row: drop` so are rows that the chat template refuses or changes. Beside each unpaired row stands a
reply to another prompt (`stages.lib.data.mismatched_replies`).

Rows are encoded in shards on all cores (runtime.yaml: workers), and what is encoded is kept: a run that was killed goes
on from there.

    python -m stages.tokenize_data --kind sft --prepared data/prepared --tokenizer models/base \\
        --tokens data/tokens --metrics metrics/tokenize_data
"""

import hashlib
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import pyarrow
import typer

from stages.lib.command.entries import entry_name
from stages.lib.command.errors import StageError
from stages.lib.command.jsonl import write_json
from stages.lib.command.outputs import remove, require_places
from stages.lib.command.params import read_params, read_value
from stages.lib.command.run import run
from stages.lib.data.chat import REASONING_FIELDS, load_tokenizer
from stages.lib.data.encoding import NOT_REVERSIBLE, SPECIAL_TOKEN_IN_TEXT
from stages.lib.data.mismatched_replies import add_mismatched
from stages.lib.data.prepared_rows import KINDS, MAY_BE_EMPTY, SPLITS, Kind, Split
from stages.lib.data.template_process import template_process
from stages.lib.data.token_rows import PROMPT_TOO_LONG, TOO_LONG, Counts
from stages.lib.data.token_shards import Shard, ShardEncoder, encoded_shards, read_shard, row_shards, workers_for
from stages.lib.models.model_facts import ModelFacts, read_config, read_model_facts
from stages.lib.models.tokenizer_files import tokenizer_hash, tokenizer_inputs
from stages.lib.operations.run_log import log_run
from stages.lib.settings.declaration import plain
from stages.lib.settings.runtime import read_runtime
from stages.lib.settings.tokenize_data import Tokenize

if TYPE_CHECKING:
    from stages.lib.runs.scratch import ScratchFolder

STAGE = "tokenize_data"
USUAL_REASONS = (NOT_REVERSIBLE, PROMPT_TOO_LONG, SPECIAL_TOKEN_IN_TEXT, TOO_LONG)  # counted even where there is none
SECONDS_BETWEEN_REPORTS = 10.0
DIGEST_BYTES = 32


def facts_with_room(model: Path, settings: Tokenize) -> ModelFacts:
    """What is known of the model. Raises StageError unless sequences of `max_length` have a position in the model."""
    file = model / "config.json"
    facts = read_model_facts(read_config(model), str(file))
    if facts.vocab_size is None:
        raise StageError(f"{file}: expected a whole number as 'vocab_size', found nothing")
    if facts.positions is not None and settings.max_length > facts.positions:
        raise StageError(
            f"params.yaml: tokenize_data.max_length is {settings.max_length}, but the model of {model} has "
            f"{facts.positions} positions; lower tokenize_data.max_length"
        )
    return facts


class KeptShards:
    """Shards that this version of the code has encoded, in the scratch folder of this run, each with its SHA-256."""

    def __init__(self, scratch: "ScratchFolder") -> None:
        self.scratch = scratch
        self.said = False

    def _name(self, shard: Shard) -> str:
        return f"{self.scratch.code[:16]}-{shard.path.parent.name}-{shard.first_row}"

    def read(self, shard: Shard) -> bytes | None:
        """What was kept of a shard, if it is whole."""
        path = self.scratch.kept / self._name(shard)
        content = path.read_bytes() if path.is_file() else b""
        digest, payload = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            return None
        if not self.said:
            print(f"{STAGE}: resuming, goes on from what an earlier start has kept", flush=True)
            self.said = True
        return payload

    def keep(self, shard: Shard, payload: bytes) -> None:
        self.scratch.keep(self._name(shard), hashlib.sha256(payload).digest() + payload)


def write_tables(
    encoder: ShardEncoder,
    rows: dict[Split, Path],
    shards: dict[Split, list[Shard]],
    tables: dict[Split, Path],
    workers: int,
    kept: KeptShards,
) -> dict[Split, Counts]:
    """Encode the shards of each split into its table. Returns what each holds.

    Raises:
        StageError: of a file that has rows none is left.
    """
    counts = {split: Counts() for split in shards}
    started = reported = time.monotonic()
    todo = [(split, shard) for split in shards for shard in shards[split]]
    made = encoded_shards(encoder, [shard for _, shard in todo], workers, kept.read, kept.keep)
    with ExitStack() as open_files:
        streams = {
            split: open_files.enter_context(pyarrow.ipc.new_stream(str(tables[split]), encoder.schema_of(rows[split])))
            for split in shards
        }
        open_files.callback(made.close)  # its processes
        for (split, shard), payload in zip(todo, made, strict=True):
            counts_of_shard, batches = read_shard(payload)
            for batch in batches:
                streams[split].write_batch(batch)
            counts[split].add(counts_of_shard)
            if time.monotonic() - reported >= SECONDS_BETWEEN_REPORTS:
                reported = time.monotonic()
                done = sum(count.rows for count in counts.values())
                print(f"{shard.path}: {done:,} rows, {done / (reported - started):,.0f} rows/s", file=sys.stderr)
            if shard == shards[split][-1]:
                require_any_row(counts[split], shard.path)
    return counts


def require_any_row(counts: Counts, path: Path) -> None:
    if counts.rows == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.dropped.items()))
        raise StageError(f"{path}: no row is left ({reasons}); look at its rows and at the section tokenize_data")


def metrics_of(kind: Kind, counts: dict[Split, Counts]) -> dict[str, float]:
    """Rows and tokens of each split, lengths over all of them, and rows cut and dropped by reason."""
    metrics: dict[str, float] = {f"{split}_rows": count.rows for split, count in counts.items()}
    metrics |= {f"{split}_tokens": count.prompt_tokens + count.reply_tokens for split, count in counts.items()}
    total = Counts()
    for count in counts.values():
        total.add(count)
    metrics["max_prompt_tokens"] = total.max_prompt_tokens
    metrics["mean_prompt_tokens"] = round(total.prompt_tokens / total.rows, 3)
    if kind != "prompts":
        metrics["max_reply_tokens"] = total.max_reply_tokens
        metrics["mean_reply_tokens"] = round(total.reply_tokens / total.replies, 3)
        metrics["max_tokens"] = total.max_tokens
    if kind == "sft":
        metrics["share_trained"] = round(total.trained_tokens / (total.prompt_tokens + total.reply_tokens), 6)
    metrics |= {"cut/prompts": total.cut_prompts, "cut/replies": total.cut_replies}
    metrics["reasoning_left_out"] = total.reasoning_left_out
    return metrics | {f"dropped/{reason}": total.dropped[reason] for reason in sorted({*USUAL_REASONS, *total.dropped})}


def say(kind: Kind, counts: dict[Split, Counts], tokenizer: Path) -> None:
    """Print what the tables hold, and what of the rows they do not."""
    held = ", ".join(
        f"{count.rows:,} {split} rows ({count.prompt_tokens + count.reply_tokens:,} tokens)"
        for split, count in counts.items()
    )
    dropped, reasoning, cut = (
        sum(values)
        for values in zip(
            *(
                (count.dropped.total(), count.reasoning_left_out, max(count.cut_prompts, count.cut_replies))
                for count in counts.values()
            ),
            strict=True,
        )
    )
    print(f"tokenize {kind}: {held}, {dropped:,} rows dropped" + (f", {cut:,} cut" if cut else ""))
    if reasoning:
        print(
            f"note: in {reasoning:,} rows of {kind} the chat template of {tokenizer} leaves out reasoning that a "
            f"message has ({', '.join(REASONING_FIELDS)}); it is neither read nor trained"
        )


def main(
    prepared: Annotated[Path, typer.Option(help="Folder of the prepared rows, a folder for each split.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder with the base model's tokenizer and config.json.")],
    tokens: Annotated[Path, typer.Option(help="Folder to write the tables below, in a folder for each split.")],
    metrics: Annotated[Path, typer.Option(help="Folder to write the counts into, as <kind>.json.")],
    kind: Annotated[str | None, typer.Option(help="What the rows are; else what DVC runs the stage for.")] = None,
) -> None:
    """Encode the prepared rows of one kind."""
    from stages.lib.runs.scratch import ScratchFolder

    started = time.monotonic()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are as many as there are cores
    kind = cast(Kind, entry_name(kind, KINDS, STAGE))
    settings, seed = read_params("tokenize_data", Tokenize), read_value("seed", int)
    facts = facts_with_room(tokenizer, settings)
    rows = {split: prepared / split / f"{kind}.jsonl" for split in SPLITS}
    shards = {split: row_shards(path, may_be_empty=(kind, split) in MAY_BE_EMPTY) for split, path in rows.items()}
    workers = workers_for([shard for own in shards.values() for shard in own], read_runtime(STAGE).worker_count)
    if workers == 1:
        template_process()  # it loads while this one does
    encoder = ShardEncoder(load_tokenizer(tokenizer), tokenizer_hash(tokenizer), kind, settings, seed, facts)
    outs = {f"{split}.arrow": tokens / split / f"{kind}.arrow" for split in SPLITS}
    outs |= {"metrics.json": metrics / f"{kind}.json"}
    require_places(outs.values())
    inputs = [*rows.values(), *tokenizer_inputs(tokenizer)]
    scratch = ScratchFolder(STAGE, {STAGE: plain(settings), "seed": seed, "kind": kind}, inputs)
    if not scratch.publish_complete(outs):
        folder = scratch.stage_outs()
        tables = {split: folder / f"{split}.arrow" for split in SPLITS}
        counts = write_tables(encoder, rows, shards, tables, workers, KeptShards(scratch))
        values = metrics_of(kind, counts)
        if kind == "unpaired":
            found = [add_mismatched(table, seed, settings.max_length) for table in tables.values()]
            values["cut/mismatched"] = sum(of_split.cut for of_split in found)
            values["without_mismatched"] = sum(of_split.missing for of_split in found)
        write_json(folder / "metrics.json", values)
        scratch.complete(outs, lambda hashes: log_run(f"{STAGE}@{kind}", hashes, time.monotonic() - started))
        remove(scratch.kept)
        say(kind, counts, tokenizer)
        if kind == "prompts" and settings.text_prompt_tokens and not any(held.plain_texts for held in counts.values()):
            print(
                "warning: no prompt is plain text, so none is cut as tokenize_data.text_prompt_tokens says",
                file=sys.stderr,
            )
        scratch.publish_complete(outs)
    scratch.release()


if __name__ == "__main__":
    run(main)
