"""Raw data becomes prepared rows of three kinds, in train and eval splits that share no prompt.

    sft         {"messages": [...]}                     the prompt and its (preferred) reply
    preference  {"prompt", "chosen", "rejected"}        and "margin" where the raw data has one
    prompts     {"prompt"}                              each distinct prompt once

A row that breaks a rule is dropped and counted by reason in the metrics. Run it with the settings of the section
`prepare_data` of params.yaml:

    python -m stages.prepare_data --raw data/raw/none --out data/prepared --metrics metrics/prepare_data.json
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

from stages.lib import film_reviews
from stages.lib.conversations import Example, UnusableRowError
from stages.lib.errors import StageError, run
from stages.lib.formats import Format, detect_format, read_example, renamed
from stages.lib.hashing import dvc_hashes
from stages.lib.jsonl import write_json
from stages.lib.outputs import written_whole
from stages.lib.params import read_params, read_value
from stages.lib.prompt_splits import eval_prompts, prompt_digest
from stages.lib.raw_rows import hub_rows, local_rows
from stages.lib.run_log import log_run
from stages.lib.settings.prepare_data import Kind, PrepareData

KINDS: tuple[Kind, ...] = ("sft", "preference", "prompts")
SPLITS = ("train", "eval")
PreparedRow = tuple[Kind, str, dict[str, Any]]


def raw_rows(settings: PrepareData, raw: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of the raw data, at most `max_rows` of them, with columns renamed."""
    if settings.source == "local":
        rows = local_rows(raw)
    else:
        rows = hub_rows(settings.hub_dataset, settings.hub_revision, settings.hub_data_dir, settings.hub_split)
    for where, row in islice(rows, settings.max_rows):
        yield where, renamed(row, settings.columns, where)


def format_of(settings: PrepareData, raw: Path) -> Format:
    """The format named, or the one of the first row."""
    if settings.format != "auto":
        return settings.format
    where, row = next(raw_rows(settings, raw), (None, None))
    if row is None:
        raise StageError(f"{settings.hub_dataset} at revision {settings.hub_revision} holds no row")
    return detect_format(row, where)


def examples(settings: PrepareData, raw: Path, counts: Counter) -> Iterator[Example]:
    """The examples of all raw rows that keep to the rules, each once; what is dropped is counted in `counts`."""
    name = format_of(settings, raw)
    seen = set()
    for where, row in raw_rows(settings, raw):
        counts["raw_rows"] += 1
        try:
            example = read_example(row, name, where)
            if example.rejected is None and "preference" in settings.kinds:
                raise StageError(
                    f"{where}: format '{name}' has no rejected replies, so kind 'preference' cannot be made; "
                    "give preference data, or leave it out of kinds"
                )
            digest = content_digest([example.prompt, example.reply, example.rejected])
            if digest in seen:
                raise UnusableRowError("duplicate")
        except UnusableRowError as dropped:
            counts[f"dropped/{dropped}"] += 1
            continue
        seen.add(digest)
        yield example


def content_digest(content: Any) -> bytes:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).digest()


def converted_rows(settings: PrepareData, raw: Path, seed: int, counts: Counter) -> Iterator[PreparedRow]:
    """Prepared rows of a local or Hub data set.

    The raw data is read twice, first for its distinct prompts and then for its rows, so that memory holds 16 bytes a
    row and prompt and not the rows themselves.
    """
    digests = {prompt_digest(example.prompt, seed) for example in examples(settings, raw, counts)}
    if not digests:
        dropped = ", ".join(f"{key.removeprefix('dropped/')} {count}" for key, count in sorted(dropped_of(counts)))
        raise StageError(f"{origin(settings, raw)}: all {counts['raw_rows']} rows were dropped ({dropped})")
    held_out = eval_prompts(digests, settings.eval_fraction)
    seen_replies: set[bytes] = set()
    seen_prompts: set[bytes] = set()
    for example in examples(settings, raw, Counter()):
        digest = prompt_digest(example.prompt, seed)
        split = "eval" if digest in held_out else "train"
        if example.rejected is not None:
            yield "preference", split, preference_row(example)
        if is_new(content_digest([example.prompt, example.reply]), seen_replies):
            yield "sft", split, {"messages": [*example.prompt, assistant(example.reply)]}
        if is_new(digest, seen_prompts):
            yield "prompts", split, {"prompt": example.prompt}


def preference_row(example: Example) -> dict[str, Any]:
    row = {
        "prompt": example.prompt,
        "chosen": [assistant(example.reply)],
        "rejected": [assistant(example.rejected)],
    }
    return row if example.margin is None else row | {"margin": example.margin}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def is_new(digest: bytes, seen: set[bytes]) -> bool:
    """True the first time that `digest` is asked for."""
    known = digest in seen
    seen.add(digest)
    return not known


def origin(settings: PrepareData, raw: Path) -> str:
    """What to call the raw data in a message."""
    return str(raw) if settings.source == "local" else f"{settings.hub_dataset} at revision {settings.hub_revision}"


def dropped_of(counts: Counter) -> list[tuple[str, int]]:
    return [(key, count) for key, count in counts.items() if key.startswith("dropped/")]


def generated_rows(settings: PrepareData, seed: int, counts: Counter) -> Iterator[PreparedRow]:
    """Prepared rows of the film-review generator, with the accuracy of its best possible reward model."""
    generated = film_reviews.generate(settings.film_reviews, seed)
    counts["bayes_accuracy"] = generated.bayes_accuracy
    for kind in KINDS:
        for split in SPLITS:
            for row in generated.rows[kind][split]:
                yield kind, split, row


def write_prepared(rows: Iterator[PreparedRow], kinds: tuple[Kind, ...], folders: dict[Kind, Path]) -> Counter:
    """Write every row to the file of its kind and split; a kind that is not wanted gets empty files. Returns counts."""
    written = Counter({f"{kind}/{split}_rows": 0 for kind in KINDS for split in SPLITS})
    with ExitStack() as stack:
        files = {}
        for kind, folder in folders.items():
            folder.mkdir(parents=True)
            for split in SPLITS:
                files[kind, split] = stack.enter_context((folder / f"{split}.jsonl").open("w", encoding="utf-8"))
        for kind, split, row in rows:
            if kind in kinds:
                files[kind, split].write(json.dumps(row, ensure_ascii=False) + "\n")
                written[f"{kind}/{split}_rows"] += 1
    return written


def main(
    raw: Annotated[Path, typer.Option(help="Data file or folder of source local; not read with any other source.")],
    out: Annotated[Path, typer.Option(help="Folder to write sft, preference and prompts below.")],
    metrics: Annotated[Path, typer.Option(help="JSON file of the counts to write.")],
) -> None:
    """Turn raw data into prepared rows for SFT, preference learning and RL."""
    started = time.monotonic()
    settings = read_params("prepare_data", PrepareData)
    seed = read_value("seed", int)
    counts: Counter = Counter()
    if settings.source == "film_reviews":
        rows = generated_rows(settings, seed, counts)
    else:
        rows = converted_rows(settings, raw, seed, counts)
    with written_whole(*(out / kind for kind in KINDS), metrics) as (*folders, metrics_partial):
        written = write_prepared(rows, settings.kinds, dict(zip(KINDS, folders, strict=True)))
        values = dict(sorted({**counts, **written}.items()))
        write_json(metrics_partial, values)
    log_run("prepare_data", dvc_hashes([*(out / kind for kind in KINDS), metrics]), time.monotonic() - started)
    for key, value in values.items():
        print(f"{key:32} {value}")


if __name__ == "__main__":
    run(main)
