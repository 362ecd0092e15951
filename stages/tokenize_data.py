"""Encode prepared rows once into token tables that every later stage reads.

Prompt and reply are encoded apart and joined as ids (`stages.lib.data.chat`): masks come from lengths, a reply ends in
exactly one EOS, and the ids are checked to decode to the text. Rows that cannot be encoded so are dropped and counted;
with `on_unusable_row: drop` so are rows that the chat template refuses or changes.

    python -m stages.tokenize_data --kind sft --prepared data/prepared --tokenizer models/base \\
        --tokens data/tokens --metrics metrics/tokenize_data
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast

import pyarrow
import typer

from stages.lib.command.entries import entry_name
from stages.lib.command.errors import StageError
from stages.lib.command.hashing import dvc_hash, dvc_hashes
from stages.lib.command.jsonl import read_jsonl, write_json
from stages.lib.command.outputs import written_whole
from stages.lib.command.params import read_params
from stages.lib.command.run import run
from stages.lib.data.chat import (
    NOT_REVERSIBLE,
    SPECIAL_TOKEN_IN_TEXT,
    RefusedRowError,
    encode_completion,
    encode_prompt,
    load_tokenizer,
    render_ahead,
)
from stages.lib.data.conversations import UnusableRowError
from stages.lib.data.prepared_rows import (
    KINDS,
    SPLITS,
    Conversation,
    Kind,
    preference_conversation,
    prompt_conversation,
    sft_conversation,
)
from stages.lib.data.prompts import json_text
from stages.lib.data.template_process import template_process
from stages.lib.data.token_tables import (
    PREFERENCE_SCHEMA,
    PROMPT_SCHEMA,
    SFT_SCHEMA,
    TOKENIZER_NOTE,
    TableWriter,
    check_table_fits,
    read_table,
)
from stages.lib.models.model_facts import ModelFacts, read_config, read_model_facts
from stages.lib.models.tokenizer_files import tokenizer_hash
from stages.lib.operations.run_log import log_run
from stages.lib.settings.tokenize_data import Tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_TOO_LONG = "prompt_too_long"
TOO_LONG = "too_long"
EQUAL_REPLIES = "equal_replies"
INVALID_UNICODE = "invalid_unicode"
USUAL_REASONS = (NOT_REVERSIBLE, PROMPT_TOO_LONG, SPECIAL_TOKEN_IN_TEXT, TOO_LONG)  # counted even where there is none
SECONDS_BETWEEN_REPORTS = 10.0
ROWS_RENDERED_AT_ONCE = 64


class Encoded(NamedTuple):
    """One row as ids: the columns of its table beside `row`, and what the budgets and metrics look at."""

    columns: dict[str, Any]
    prompt_tokens: int
    longest: int  # prompt and its longest reply
    tokens: int  # all ids of the row


def sft_columns(prompt: list[int], reply: list[int], _row: Conversation) -> dict[str, Any]:
    return {"input_ids": prompt + reply, "loss_mask": [False] * len(prompt) + [True] * len(reply)}


def preference_columns(prompt: list[int], chosen: list[int], rejected: list[int], row: Conversation) -> dict[str, Any]:
    if chosen == rejected:  # a template may cut off the white space that they differ in
        raise UnusableRowError(EQUAL_REPLIES)
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "margin": row.margin}


def prompt_columns(prompt: list[int], row: Conversation) -> dict[str, Any]:
    try:
        messages = json_text(row.prompt)
    except UnicodeEncodeError:  # in an earlier turn of the assistant, which the template leaves out
        raise UnusableRowError(INVALID_UNICODE) from None
    return {"prompt_ids": prompt, "messages": messages, "facts": json_text(row.facts)}


class Encoding(NamedTuple):
    """How rows of a kind are read, and what their table holds."""

    read: Callable[[dict[str, Any], str], Conversation]
    columns: Callable[..., dict[str, Any]]  # of the prompt's ids, those of each reply, and the conversation
    schema: pyarrow.Schema


ENCODINGS: dict[Kind, Encoding] = {
    "sft": Encoding(sft_conversation, sft_columns, SFT_SCHEMA),
    "preference": Encoding(preference_conversation, preference_columns, PREFERENCE_SCHEMA),
    "prompts": Encoding(prompt_conversation, prompt_columns, PROMPT_SCHEMA),
}


def within_budget(encoded: Encoded, settings: Tokenize, where: str) -> Encoded:
    """The row, if it fits; else a StageError or, with `overlong: drop`, an UnusableRowError. Nothing is cut short."""
    if encoded.prompt_tokens > settings.max_prompt_length:
        reason, key = PROMPT_TOO_LONG, "max_prompt_length"
        found = f"prompt has {encoded.prompt_tokens} tokens, budget is {settings.max_prompt_length}"
    elif encoded.longest > settings.max_length:
        reason, key = TOO_LONG, "max_length"
        found = f"prompt and reply have {encoded.longest} tokens, budget is {settings.max_length}"
    else:
        return encoded
    if settings.overlong == "drop":
        raise UnusableRowError(reason)
    raise StageError(f"{where}: {found}; raise tokenize_data.{key} or set tokenize_data.overlong: drop")


@dataclass
class Counts:
    """What went into one table."""

    rows: int = 0
    tokens: int = 0
    longest_prompt: int = 0
    longest: int = 0

    def add(self, encoded: Encoded) -> None:
        self.rows += 1
        self.tokens += encoded.tokens
        self.longest_prompt = max(self.longest_prompt, encoded.prompt_tokens)
        self.longest = max(self.longest, encoded.longest)


def rows_to_encode(
    tokenizer: "PreTrainedTokenizerBase", kind: Kind, source: Path
) -> Iterator[tuple[int, str, Conversation]]:
    """Yield (number, place, row) of a prepared file, rendered ahead. Raises StageError where a faulty row comes."""
    numbered = enumerate(read_jsonl(source))
    fault = None
    while fault is None:
        rows: list[tuple[int, str, Conversation]] = []
        try:
            for number, row in islice(numbered, ROWS_RENDERED_AT_ONCE):
                where = f"{source}, line {number + 1}"
                rows.append((number, where, ENCODINGS[kind].read(row, where)))
        except StageError as error:
            fault = error
        render_ahead(tokenizer, [(row.prompt, row.replies) for _, _, row in rows])
        yield from rows
        if not rows:
            break
    if fault:
        raise fault


def encode_file(
    tokenizer: "PreTrainedTokenizerBase",
    kind: Kind,
    source: Path,
    target: Path,
    settings: Tokenize,
    notes: dict[str, str],
) -> tuple[Counts, Counter[str]]:
    """Encode one split row by row into `target`. Returns what it holds and the rows dropped by reason."""
    counts, dropped = Counts(), Counter()
    if not source.is_file():
        raise StageError(f"{source} does not exist")
    started = reported = time.monotonic()
    with TableWriter(target, ENCODINGS[kind].schema.with_metadata(notes | {"rows": dvc_hash(source)})) as writer:
        for number, where, row in rows_to_encode(tokenizer, kind, source):
            try:
                encoded = within_budget(encode_row(tokenizer, kind, row, where, settings), settings, where)
            except UnusableRowError as error:
                dropped[error.args[0]] += 1
                continue
            writer.append({"row": number, **encoded.columns})
            counts.add(encoded)
            if time.monotonic() - reported >= SECONDS_BETWEEN_REPORTS:
                reported = time.monotonic()
                print(f"{source}: {number + 1:,} rows, {number / (reported - started):,.0f} rows/s", file=sys.stderr)
    if counts.rows == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        raise StageError(f"{source}: no row is left ({reasons}); look at its rows and at the section tokenize_data")
    return counts, dropped


def encode_row(
    tokenizer: "PreTrainedTokenizerBase", kind: Kind, row: Conversation, where: str, settings: Tokenize
) -> Encoded:
    """Encode one row; a complaint of the chat template gets the row's place put before it.

    What the template refuses is an UnusableRowError with `on_unusable_row: drop`.
    """
    try:
        prompt = encode_prompt(tokenizer, row.prompt)
        replies = [encode_completion(tokenizer, row.prompt, reply) for reply in row.replies]
    except RefusedRowError as error:
        if settings.on_unusable_row == "drop":
            raise UnusableRowError(error.reason) from None
        raise StageError(
            f"{where}: {error}; mend the row or the chat template, or set tokenize_data.on_unusable_row: drop"
        ) from None
    except StageError as error:
        raise StageError(f"{where}: {error}") from None
    lengths = [len(reply) for reply in replies]
    columns = ENCODINGS[kind].columns(prompt, *replies, row)
    return Encoded(columns, len(prompt), len(prompt) + max(lengths, default=0), len(prompt) + sum(lengths))


def metrics_of(kind: Kind, counts: dict[str, Counts], dropped: Counter[str]) -> dict[str, int]:
    metrics = {f"{split}_rows": counts[split].rows for split in SPLITS}
    metrics |= {f"{split}_tokens": counts[split].tokens for split in SPLITS}
    metrics["max_prompt_tokens"] = max(count.longest_prompt for count in counts.values())
    if kind != "prompts":
        metrics["max_tokens"] = max(count.longest for count in counts.values())
    reasons = sorted({*USUAL_REASONS, *dropped})
    return metrics | {f"dropped/{reason}": dropped[reason] for reason in reasons}


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


def main(
    prepared: Annotated[Path, typer.Option(help="Folder of the prepared rows, a folder for each split.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder with the base model's tokenizer and config.json.")],
    tokens: Annotated[Path, typer.Option(help="Folder to write the tables below, in a folder for each split.")],
    metrics: Annotated[Path, typer.Option(help="Folder to write the counts into, as <kind>.json.")],
    kind: Annotated[str | None, typer.Option(help="What the rows are; else what DVC runs the stage for.")] = None,
) -> None:
    """Encode the prepared rows of one kind."""
    started = time.monotonic()
    kind = cast(Kind, entry_name(kind, KINDS, "tokenize_data"))
    settings = read_params("tokenize_data", Tokenize)
    template_process()  # it loads while this one does
    facts = facts_with_room(tokenizer, settings)
    loaded = load_tokenizer(tokenizer)
    notes = {TOKENIZER_NOTE: tokenizer_hash(tokenizer)}
    counts: dict[str, Counts] = {}
    dropped: Counter[str] = Counter()
    outs = [*(tokens / split / f"{kind}.arrow" for split in SPLITS), metrics / f"{kind}.json"]
    with written_whole(*outs) as (*tables, metrics_partial):
        for split, table in zip(SPLITS, tables, strict=True):
            rows = prepared / split / f"{kind}.jsonl"
            counts[split], lost = encode_file(loaded, kind, rows, table, settings, notes)
            dropped += lost
            check_table_fits(read_table(table, ENCODINGS[kind].schema), facts, rows)
        write_json(metrics_partial, metrics_of(kind, counts, dropped))
    log_run(f"tokenize_data@{kind}", dvc_hashes(outs), time.monotonic() - started)
    summary = ", ".join(f"{counts[split].rows:,} {split} rows ({counts[split].tokens:,} tokens)" for split in SPLITS)
    print(f"tokenize {kind}: {summary}, {dropped.total():,} rows dropped")


if __name__ == "__main__":
    run(main)
