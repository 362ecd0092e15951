"""Encode prepared rows once into token tables that every later stage reads.

Prompt and reply are encoded apart and joined as ids (see `stages.lib.chat`): masks come from lengths, a reply ends in
exactly one EOS, and the ids are checked to decode to the text. Rows that cannot be encoded so are dropped and counted.

    python -m stages.tokenize_and_cache --kind sft --rows data/prepared/sft --tokenizer models/base \\
        --out data/tokens/sft --metrics metrics/tokenize/sft.json
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import pyarrow
import typer

from stages.lib.chat import NOT_REVERSIBLE, SPECIAL_TOKEN_IN_TEXT, encode_completion, encode_prompt, load_tokenizer
from stages.lib.conversations import Message, UnusableRowError, messages_from
from stages.lib.errors import StageError, run
from stages.lib.hashing import dvc_hashes
from stages.lib.jsonl import read_jsonl, write_json
from stages.lib.outputs import written_whole
from stages.lib.params import read_params
from stages.lib.run_log import log_run
from stages.lib.settings.tokenize import Tokenize
from stages.lib.token_tables import (
    PREFERENCE_SCHEMA,
    PROMPT_SCHEMA,
    SFT_SCHEMA,
    TableWriter,
    check_table_ids,
    read_table,
)
from stages.lib.tokenizer_files import read_model_limits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "eval")
PROMPT_TOO_LONG = "prompt_too_long"
TOO_LONG = "too_long"
REASONS = (NOT_REVERSIBLE, PROMPT_TOO_LONG, SPECIAL_TOKEN_IN_TEXT, TOO_LONG)
SECONDS_BETWEEN_REPORTS = 10.0


class Kind(StrEnum):
    """The kinds of prepared rows."""

    sft = "sft"
    preference = "preference"
    prompts = "prompts"


class Encoded(NamedTuple):
    """One row as ids: the columns of its table beside `row`, and what the budgets and metrics look at."""

    columns: dict[str, Any]
    prompt_tokens: int
    longest: int  # prompt and its longest reply
    tokens: int  # all ids of the row


def encode_sft(tokenizer: "PreTrainedTokenizerBase", row: dict[str, Any], where: str) -> Encoded:
    messages = messages_of(row, "messages", where)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise StageError(f"{where}: 'messages' must hold a prompt and end with the assistant's reply")
    prompt, reply = messages[:-1], with_text(messages[-1], where)
    prompt_ids = encode_prompt(tokenizer, prompt)
    reply_ids = encode_completion(tokenizer, prompt, reply)
    mask = [False] * len(prompt_ids) + [True] * len(reply_ids)
    columns = {"input_ids": prompt_ids + reply_ids, "loss_mask": mask}
    return Encoded(columns, len(prompt_ids), len(mask), len(mask))


def encode_preference(tokenizer: "PreTrainedTokenizerBase", row: dict[str, Any], where: str) -> Encoded:
    prompt = prompt_of(row, where)
    ids = {"prompt_ids": encode_prompt(tokenizer, prompt)}
    for name in ("chosen", "rejected"):
        replies = messages_of(row, name, where)
        if len(replies) != 1 or replies[0]["role"] != "assistant":
            raise StageError(f"{where}: '{name}' must hold exactly one message, the assistant's")
        ids[f"{name}_ids"] = encode_completion(tokenizer, prompt, with_text(replies[0], where))
    lengths = [len(value) for value in ids.values()]
    columns = {**ids, "margin": margin_of(row, where)}
    return Encoded(columns, lengths[0], lengths[0] + max(lengths[1:]), sum(lengths))


def encode_prompts(tokenizer: "PreTrainedTokenizerBase", row: dict[str, Any], where: str) -> Encoded:
    ids = encode_prompt(tokenizer, prompt_of(row, where))
    return Encoded({"prompt_ids": ids}, len(ids), len(ids), len(ids))


def messages_of(row: dict[str, Any], key: str, where: str) -> list[Message]:
    if key not in row:
        raise StageError(f"{where}: '{key}' is missing (the row has {', '.join(row) or 'no keys'})")
    return messages_from(row[key], f"{where}, '{key}'")


def prompt_of(row: dict[str, Any], where: str) -> list[Message]:
    prompt = messages_of(row, "prompt", where)
    if not prompt or prompt[-1]["role"] == "assistant":
        raise StageError(f"{where}: 'prompt' must hold messages and not end with the assistant's")
    return prompt


def with_text(reply: Message, where: str) -> Message:
    if not reply["content"].strip():
        raise StageError(f"{where}: the reply is empty")
    return reply


def margin_of(row: dict[str, Any], where: str) -> float | None:
    """The margin of a pair, or None where it has none."""
    margin = row.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin) or margin < 0:
        raise StageError(f"{where}: 'margin' must be a finite number of at least 0, found {margin!r}")
    return float(margin)


ENCODERS: dict[Kind, tuple[Callable[..., Encoded], pyarrow.Schema]] = {
    Kind.sft: (encode_sft, SFT_SCHEMA),
    Kind.preference: (encode_preference, PREFERENCE_SCHEMA),
    Kind.prompts: (encode_prompts, PROMPT_SCHEMA),
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
    raise StageError(f"{where}: {found}; raise tokenize.{key} or set tokenize.overlong: drop")


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


def encode_file(
    tokenizer: "PreTrainedTokenizerBase", kind: Kind, source: Path, target: Path, settings: Tokenize
) -> tuple[Counts, Counter[str]]:
    """Encode one split row by row into `target`. Returns what it holds and the rows dropped by reason."""
    encode, schema = ENCODERS[kind]
    counts, dropped = Counts(), Counter()
    started = reported = time.monotonic()
    with TableWriter(target, schema) as writer:
        for number, row in enumerate(read_jsonl(source)):
            where = f"{source}, line {number + 1}"
            try:
                encoded = within_budget(encode_row(encode, tokenizer, row, where), settings, where)
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
        raise StageError(f"{source}: no row is left ({reasons}); look at its rows and at the tokenize section")
    return counts, dropped


def encode_row(
    encode: Callable[..., Encoded], tokenizer: "PreTrainedTokenizerBase", row: dict[str, Any], where: str
) -> Encoded:
    """Encode one row; a complaint of the chat template gets the row's place put before it."""
    try:
        return encode(tokenizer, row, where)
    except StageError as error:
        raise StageError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def metrics_of(kind: Kind, counts: dict[str, Counts], dropped: Counter[str]) -> dict[str, int]:
    metrics = {f"{split}_rows": counts[split].rows for split in SPLITS}
    metrics |= {f"{split}_tokens": counts[split].tokens for split in SPLITS}
    metrics["max_prompt_tokens"] = max(count.longest_prompt for count in counts.values())
    if kind is not Kind.prompts:
        metrics["max_tokens"] = max(count.longest for count in counts.values())
    return metrics | {f"dropped/{reason}": dropped[reason] for reason in REASONS}


def main(
    kind: Annotated[Kind, typer.Option(help="What the rows are.")],
    rows: Annotated[Path, typer.Option(help="Folder with train.jsonl and eval.jsonl.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder with the base model's tokenizer and config.json.")],
    out: Annotated[Path, typer.Option(help="Folder to write train.arrow and eval.arrow into.")],
    metrics: Annotated[Path, typer.Option(help="JSON file for the counts.")],
) -> None:
    """Encode the prepared rows of one kind."""
    started = time.monotonic()
    settings = read_params("tokenize", Tokenize)
    limits = read_model_limits(tokenizer)
    if limits.max_positions is not None and settings.max_length > limits.max_positions:
        raise StageError(
            f"params.yaml: tokenize.max_length is {settings.max_length}, but the model of {tokenizer} has "
            f"{limits.max_positions} positions; lower tokenize.max_length"
        )
    loaded = load_tokenizer(tokenizer)
    counts: dict[str, Counts] = {}
    dropped: Counter[str] = Counter()
    with written_whole(out, metrics) as (folder, metrics_partial):
        folder.mkdir()
        for split in SPLITS:
            table = folder / f"{split}.arrow"
            counts[split], lost = encode_file(loaded, kind, rows / f"{split}.jsonl", table, settings)
            dropped += lost
            schema = ENCODERS[kind][1]
            id_columns = [name for name in schema.names if name.endswith("_ids")]
            check_table_ids(read_table(table, schema), id_columns, limits.vocab_size, rows / f"{split}.jsonl")
        write_json(metrics_partial, metrics_of(kind, counts, dropped))
    log_run(f"tokenize@{kind}", dvc_hashes([out, metrics]), time.monotonic() - started)
    summary = ", ".join(f"{counts[split].rows:,} {split} rows ({counts[split].tokens:,} tokens)" for split in SPLITS)
    print(f"tokenize {kind}: {summary}, {dropped.total():,} rows dropped")


if __name__ == "__main__":
    run(main)
