"""The raw rows of one source become conversational rows, and a record says what was read, and what was not.

Which source it is, $DVC_STAGE says, or --name; what it is, its entry in the section `sources` of params.yaml. A row of
the source's format gives a row for each kind that the source serves (`stages.lib.data.source_rows`); one that breaks a
rule is dropped and counted by reason. Nothing is left out for being there twice: prepare_data sees to that.

    python -m stages.read_source --name hh --out data/sources --metrics metrics/read_source
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from stages.lib.command.entries import EntryOption, entry_name
from stages.lib.command.errors import StageError
from stages.lib.command.hashing import dvc_hashes
from stages.lib.command.jsonl import write_json
from stages.lib.command.outputs import written_whole
from stages.lib.command.params import read_params, read_value
from stages.lib.command.run import run
from stages.lib.data.conversations import Example, Message
from stages.lib.data.detection import FormatOfRows
from stages.lib.data.formats import Format, columns_read, examples_of
from stages.lib.data.hub_data import hub_rows
from stages.lib.data.message_cells import with_messages_read, without_keys
from stages.lib.data.prompts import Prompt
from stages.lib.data.raw_columns import RawColumns
from stages.lib.data.raw_rows import FileOptions, RawRow, local_rows
from stages.lib.data.readers.reply_trees import trees_of_rows
from stages.lib.data.readers.row_place import is_given, unread_value
from stages.lib.data.row_errors import MalformedRowError, UnusableRowError
from stages.lib.data.shown_rows import shown_row
from stages.lib.data.source_rows import SourceRow, source_rows
from stages.lib.operations.run_log import log_run
from stages.lib.settings.reading import TreeComparison
from stages.lib.settings.sources import FileSource, HubSource, Sources, TaskSettings
from stages.lib.tasks.table import TASKS
from stages.lib.tasks.task import TASK


@dataclass
class Lengths:
    """Lengths of texts, in characters."""

    count: int = 0
    total: int = 0
    longest: int = 0

    def add(self, length: int) -> None:
        self.count += 1
        self.total += length
        self.longest = max(self.longest, length)


@dataclass
class Tally:
    """What is recorded of the rows as they are written."""

    counts: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, Lengths] = field(default_factory=dict)
    shown: dict[str, SourceRow] = field(default_factory=dict)  # the first row of each kind

    def counted(self, rows: Iterator[SourceRow]) -> Iterator[SourceRow]:
        for row in rows:
            kind = row["kind"]
            self.counts[f"{kind}/rows"] += 1
            self.shown.setdefault(kind, row)
            for part, texts in parts_of(row).items():
                lengths = self.lengths.setdefault(f"{kind}/{part}", Lengths())
                for text in texts:
                    lengths.add(text)
            yield row

    def metrics(self) -> dict[str, float]:
        values: dict[str, float] = {**self.counts}
        for name, lengths in self.lengths.items():
            if lengths.count:
                values[f"{name}_characters_max"] = lengths.longest
                values[f"{name}_characters_mean"] = round(lengths.total / lengths.count, 1)
        return dict(sorted(values.items()))


def parts_of(row: SourceRow) -> dict[str, list[int]]:
    """Characters of a row's prompt and of each reply; of a text that is trained as a whole, of that."""
    if "text" in row:
        return {"prompt" if row["kind"] == "prompts" else "text": [len(row["text"])]}
    messages = row.get("messages")
    prompt = messages[:-1] if messages else row["prompt"]
    sides = (row.get(side, ()) for side in ("chosen", "rejected", "completion"))
    replies = messages[-1:] if messages else [reply for side in sides for reply in side]
    return {"prompt": [sum(map(characters, prompt))], "reply": [characters(reply) for reply in replies]}


def characters(message: Message) -> int:
    return len(message["content"] or "")


class Reading:
    """One reading of a source's raw rows: what was kept and dropped, and what became of the columns."""

    def __init__(self, settings: FileSource | HubSource, place: str) -> None:
        self.settings, self.place = settings, place
        self.counts: Counter[str] = Counter(rows_read=0, rows_kept=0)
        self.columns = RawColumns(settings.columns, settings.ignore_columns, settings.facts, settings, place)
        self.format = FormatOfRows(settings.format, settings, settings.facts)

    def rows(self) -> Iterator[SourceRow]:
        """The rows of all raw rows that keep to the rules; what is dropped is counted by reason."""
        settings = self.settings
        for where, raw in raw_rows(settings):
            self.counts["rows_read"] += 1
            try:
                examples = self.examples(raw, where)
            except UnusableRowError as dropped:
                self.counts[f"dropped/{dropped}"] += 1
            except MalformedRowError as error:
                if settings.on_unusable_row == "error":
                    raise StageError(f"{error}; {self.place}.on_unusable_row: drop leaves such rows out") from None
                self.counts[f"dropped/{error.reason}"] += 1
            else:
                self.counts["rows_kept"] += 1
                served = False
                for example in examples:
                    for row in source_rows(example, settings.kinds, settings.split, where):
                        served = True
                        yield row
                if not served:  # a reply that is not a good one, of a source without unpaired
                    self.counts["serve_no_kind"] += 1

    def examples(self, raw: RawRow, where: str) -> list[Example]:
        """What one raw row says."""
        settings = self.settings
        taken, facts = self.columns.take(raw, where)
        row = with_messages_read(taken, where)
        name = self.format.of(row, where)
        self.columns.refuse_unread(row, name, where)
        self.refuse_unused_margin(row, name, where)
        row = without_keys(row, settings.ignore_columns)
        if settings.task is not None:
            facts = {**facts, TASK: settings.task}
        examples = examples_of(row, name, settings, where, facts=facts, renames=settings.columns, counts=self.counts)
        if settings.task is not None:
            require_gradable(examples, where)
        return examples

    def refuse_unused_margin(self, row: RawRow, name: Format, where: str) -> None:
        """Raise a StageError for a margin of a source that serves no pairs."""
        read = columns_read(name, self.settings)
        if "preference" not in self.settings.kinds and "margin" in read and is_given(row.get("margin")):
            own = next((own for own, ours in self.settings.columns.items() if ours == "margin"), "margin")
            raise StageError(unread_value(f"{where}: the column '{own}' (a margin, and kinds without preference)", own))

    def finish(self) -> list[str]:
        """Lines that say what was read and what was not. Raises StageError if nothing is left, or a setting lied."""
        self.columns.refuse_unseen()
        if not self.counts["rows_kept"]:
            reply = "" if self.format.name is None else self.columns.unread_reply(self.format.name)
            raise StageError(f"{self.place}: {why_none_is_left(self.counts)}{reply}")
        if self.counts["serve_no_kind"] == self.counts["rows_kept"]:
            kinds = ", ".join(self.settings.kinds)
            raise StageError(f"{self.place}: no row serves the kinds {kinds}: by its label no reply is a good one")
        assert self.format.name is not None, "it has read rows"
        why = "named in params.yaml" if self.settings.format != "auto" else "the only one that its columns allow"
        if self.settings.comparison is not None:
            why = f"described in params.yaml as {self.settings.comparison.type}"
        return [f"format {self.format.name}: {why}", *self.columns.summary(self.format.name)]


def require_gradable(examples: list[Example], where: str) -> None:
    """Raise StageError unless the task that the facts name can grade responses to the prompts."""
    for example in examples:
        try:
            TASKS[example.facts[TASK]].grade(Prompt(0, [], example.prompt, example.facts), "")
        except StageError as error:
            raise StageError(f"{where}: {error}; name the columns that hold them in the source's facts") from None


def raw_rows(settings: FileSource | HubSource) -> Iterator[tuple[str, RawRow]]:
    """(where, row) of the raw data, at most `max_rows` of them; of a flat file of messages its trees."""
    if isinstance(settings, FileSource):
        options = FileOptions(settings.delimiter, settings.rows_key)
        rows = islice(local_rows(Path(settings.path), options), settings.max_rows)
    else:
        rows = hub_rows(settings.data, settings.max_rows)
    if isinstance(settings.comparison, TreeComparison) and settings.comparison.id_key is not None:
        rows = trees_of_rows(rows, settings.comparison)
    yield from rows


def why_none_is_left(counts: Counter[str]) -> str:
    dropped = sorted((key, count) for key, count in counts.items() if key.startswith("dropped/"))
    reasons = ", ".join(f"{key.removeprefix('dropped/')} {count}" for key, count in dropped)
    return f"all {counts['rows_read']} rows were dropped ({reasons})" if counts["rows_read"] else "there is no row"


def task_rows(settings: TaskSettings, seed: int) -> Iterator[SourceRow]:
    for kind, split, values in TASKS[settings.task].rows(settings, seed):
        yield {"kind": kind, "split": split, **values}


def write_rows(path: Path, rows: Iterator[SourceRow]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def record(name: str, lines: list[str], values: dict[str, float], tally: Tally) -> str:
    """The text of the record: what was read, the numbers, and the first row of each kind."""
    shown = [f"\nThe first row of kind {kind}:\n\n{shown_row(row)}" for kind, row in sorted(tally.shown.items())]
    numbers = [f"{key} {value}" for key, value in values.items()]
    return "\n".join([f"Source {name}", "", *lines, "", *numbers, *shown]) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="Folder to write the source's folder into.")],
    metrics: Annotated[Path, typer.Option(help="Folder to write the record into, as <name>.json and <name>.txt.")],
    name: EntryOption = None,
) -> None:
    """Read the rows of one source."""
    started = time.monotonic()
    sources = read_params("sources", Sources)
    name = entry_name(name, sources.by_name, "sources")
    settings, tally = sources.by_name[name], Tally()
    outs = [out / name / "rows.jsonl", metrics / f"{name}.json", metrics / f"{name}.txt"]
    with written_whole(*outs) as (file, numbers, text):
        if isinstance(settings, TaskSettings):
            write_rows(file, tally.counted(task_rows(settings, read_value("seed", int))))
            lines, counts = [f"made by the task {settings.task}"], Counter[str]()
        else:
            reading = Reading(settings, sources.place_of(name))
            write_rows(file, tally.counted(reading.rows()))
            lines, counts = reading.finish(), reading.counts
        values = {**dict(sorted(counts.items())), **tally.metrics()}
        write_json(numbers, values)
        said = record(name, lines, values, tally)
        text.write_text(said, encoding="utf-8")
    log_run(f"read_source@{name}", dvc_hashes(outs), time.monotonic() - started)
    print(said, end="")


if __name__ == "__main__":
    run(main)
