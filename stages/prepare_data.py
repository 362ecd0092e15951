"""Raw data becomes prepared rows of three kinds, in train and eval splits that share no prompt.

    sft         {"messages": [...]}                     the prompt and its (preferred) reply
    preference  {"prompt", "chosen", "rejected"}        and "margin" where the raw data has one
    prompts     {"prompt"}                              each distinct prompt once; and "facts" where a task has some

A row that breaks a rule is dropped and counted by reason in the metrics. What the raw data is, is said in the section
`prepare_data` of params.yaml, its path included:

    python -m stages.prepare_data --out data/prepared --metrics metrics/prepare_data.json
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import dvc_hashes
from stages.lib.command.jsonl import write_json
from stages.lib.command.outputs import written_whole
from stages.lib.command.params import read_params, read_value
from stages.lib.command.run import run
from stages.lib.data.conversations import Example, MalformedRowError, UnusableRowError
from stages.lib.data.detection import FormatOfRows
from stages.lib.data.formats import AS_THEY_ARE, examples_of
from stages.lib.data.message_cells import with_messages_read, without_keys
from stages.lib.data.prepared_rows import KINDS, SPLITS, Kind, PreparedRow, Split
from stages.lib.data.prompt_splits import eval_prompts, prompt_digests
from stages.lib.data.raw_columns import RawColumns
from stages.lib.data.raw_rows import RawRow, hub_rows, local_rows
from stages.lib.operations.run_log import log_run
from stages.lib.settings.prepare_data import PrepareData
from stages.lib.tasks.table import TASKS


def raw_rows(settings: PrepareData) -> Iterator[tuple[str, RawRow]]:
    """(where, row) of the raw data, at most `max_rows` of them."""
    if settings.source == "local":
        rows = local_rows(Path(settings.path))
    else:
        assert settings.hub_dataset is not None, "the settings name one with source hub"
        assert settings.hub_revision is not None, "and give its commit"
        rows = hub_rows(settings.hub_dataset, settings.hub_revision, settings.hub_data_dir, settings.hub_split)
    yield from islice(rows, settings.max_rows)


class Reading:
    """One reading of all raw rows: its examples, what was dropped, and what became of the columns."""

    def __init__(self, settings: PrepareData) -> None:
        self.settings = settings
        self.counts: Counter = Counter()
        self.columns = RawColumns(settings.columns, settings.ignore_columns)
        self.format = FormatOfRows(settings.format)

    def examples(self) -> Iterator[Example]:
        """The examples of all rows that keep to the rules, each once; what is dropped is counted by reason."""
        seen: set[bytes] = set()
        for where, row in raw_rows(self.settings):
            self.counts["raw_rows"] += 1
            try:
                example = self.example(row, where)
                if not is_new(content_digest([example.prompt, example.reply, example.rejected]), seen):
                    raise UnusableRowError("duplicate")
            except UnusableRowError as dropped:
                self.counts[f"dropped/{dropped}"] += 1
            except MalformedRowError as error:
                if self.settings.on_unusable_row == "error":
                    raise StageError(f"{error}; prepare_data.on_unusable_row: drop leaves such rows out") from None
                self.counts[f"dropped/{error.reason}"] += 1
            else:
                yield example

    def example(self, row: RawRow, where: str) -> Example:
        row = with_messages_read(self.columns.take(row, where), where)
        name = self.format.of(row, where)
        self.columns.refuse_unread(row, name, where)
        row = without_keys(row, self.settings.ignore_columns)
        (example,) = examples_of(row, name, AS_THEY_ARE, where, renames=self.settings.columns, counts=self.counts)
        if example.rejected is None and "preference" in self.settings.kinds:
            raise StageError(
                f"{where}: format '{name}' has no rejected replies, so kind 'preference' cannot be made; "
                "give preference data, or leave it out of kinds"
            )
        return example


def content_digest(content: Any) -> bytes:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).digest()


def converted_rows(settings: PrepareData, seed: int, counts: Counter) -> Iterator[PreparedRow]:
    """Prepared rows of a local or Hub data set.

    The raw data is read twice, first for its distinct prompts and then for its rows, so that memory holds 16 bytes for
    each row, prompt and beginning of a prompt, and not the rows themselves.
    """
    first = Reading(settings)
    beginnings: dict[bytes, bytes] = {}
    for example in first.examples():
        *shorter, digest = prompt_digests(example.prompt, seed)
        beginnings[digest] = b"".join(shorter)
    counts.update(first.counts)
    first.columns.refuse_unseen()
    if not beginnings:
        raise StageError(f"{origin(settings)}: {why_none_is_left(counts)}")
    assert first.format.name is not None, "it has read rows"
    print(first.columns.summary(first.format.name))
    held_out = eval_prompts(beginnings, settings.eval_fraction)
    seen_replies: set[bytes] = set()
    seen_prompts: set[bytes] = set()
    for example in Reading(settings).examples():
        digest = prompt_digests(example.prompt, seed)[-1]
        split: Split = "eval" if digest in held_out else "train"
        if example.rejected is not None:
            values = {"prompt": example.prompt, "chosen": [example.reply], "rejected": [example.rejected]}
            values |= {} if example.margin is None else {"margin": example.margin}
            yield PreparedRow("preference", split, values)
        if example.reply is not None and is_new(content_digest([example.prompt, example.reply]), seen_replies):
            yield PreparedRow("sft", split, {"messages": [*example.prompt, example.reply]})
        if is_new(digest, seen_prompts):
            yield PreparedRow("prompts", split, {"prompt": example.prompt})


def why_none_is_left(counts: Counter) -> str:
    dropped = sorted((key, count) for key, count in counts.items() if key.startswith("dropped/"))
    reasons = ", ".join(f"{key.removeprefix('dropped/')} {count}" for key, count in dropped)
    return f"all {counts['raw_rows']} rows were dropped ({reasons})" if counts["raw_rows"] else "there is no row"


def is_new(digest: bytes, seen: set[bytes]) -> bool:
    """True the first time that `digest` is asked for."""
    known = digest in seen
    seen.add(digest)
    return not known


def origin(settings: PrepareData) -> str:
    """What to call the raw data in a message."""
    hub = f"{settings.hub_dataset} at revision {settings.hub_revision}"
    return settings.path if settings.source == "local" else hub


def write_prepared(rows: Iterator[PreparedRow], kinds: tuple[Kind, ...], folders: dict[Kind, Path]) -> Counter:
    """Write every row to the file of its kind and split; a kind that is not wanted gets empty files. Returns counts."""
    written = Counter({f"{kind}/{split}_rows": 0 for kind in KINDS for split in SPLITS})
    with ExitStack() as stack:
        files = {}
        for kind, folder in folders.items():
            folder.mkdir(parents=True)
            for split in SPLITS:
                files[kind, split] = stack.enter_context((folder / f"{split}.jsonl").open("w", encoding="utf-8"))
        for kind, split, values in rows:
            if kind in kinds:
                files[kind, split].write(json.dumps(values, ensure_ascii=False) + "\n")
                written[f"{kind}/{split}_rows"] += 1
    return written


def main(
    out: Annotated[Path, typer.Option(help="Folder to write sft, preference and prompts below.")],
    metrics: Annotated[Path, typer.Option(help="JSON file of the counts to write.")],
) -> None:
    """Turn raw data into prepared rows for SFT, preference learning and RL."""
    started = time.monotonic()
    settings = read_params("prepare_data", PrepareData)
    seed = read_value("seed", int)
    counts: Counter = Counter()
    known: dict[str, float] = {}
    if settings.source in TASKS:
        task, task_settings = TASKS[settings.source], getattr(settings, settings.source)
        rows, known = task.rows(task_settings, seed), task.known(task_settings, seed)
    else:
        rows = converted_rows(settings, seed, counts)
    with written_whole(*(out / kind for kind in KINDS), metrics) as (*folders, metrics_partial):
        written = write_prepared(rows, settings.kinds, dict(zip(KINDS, folders, strict=True)))
        values = dict(sorted({**counts, **written, **known}.items()))
        write_json(metrics_partial, values)
    log_run("prepare_data", dvc_hashes([*(out / kind for kind in KINDS), metrics]), time.monotonic() - started)
    for key, value in values.items():
        print(f"{key:32} {value}")


if __name__ == "__main__":
    run(main)
