"""Raw rows of every format, in every type of file."""

import csv
import gzip
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from stages.lib.settings.declaration import block
from stages.lib.settings.sources import FileSource
from tests.fuzz.areas.raw_rows import NAMED_ROWS, sound
from tests.fuzz.case import Area, Case, Expected, Whole, put
from tests.fuzz.mutations import DIGITS, json_text, mutated_bytes, mutated_tree

Rows = list[Any]
PAIRS = ("hh", "preference", "preference_chat", "preference_implicit", "sharegpt_preference", "alpaca_preference")
PAIRS += ("question_preference", "messages_preference", "openai_preference")
REPLIES = ("alpaca", "messages", "prompt_completion", "sharegpt", "question_answer")
KINDS = {
    **{name: ["sft", "preference", "prompts"] for name in PAIRS},
    **{name: ["sft", "prompts"] for name in REPLIES},
    "prompt": ["prompts"],
    "text": ["sft"],
}
FOLDER = "data/raw/mine"
READING = ("read_source@mine", "prepare_data")


def settings_for(name: str, path: str, **changed: Any) -> dict[str, Any]:
    """The one source of rows of a format; it is left to be detected unless `format` is given."""
    kinds = changed.pop("kinds", KINDS[name])
    source = block(FileSource) | {"path": path, "kinds": kinds} | changed
    return {
        "sources": Whole(files={"mine": source}, hub={}, tasks={}, arithmetic={}),
        "prepare_data": {"kinds": kinds, "validation_fraction": 0.2, "test_fraction": 0.2},
        "tokenize_data": {"truncation": "drop"},
    }


def stages_for(kinds: list[str]) -> tuple[str, ...]:
    """The stages from raw rows to the tokens of the kind that holds most of what they say."""
    kind = next(kind for kind in ("preference", "unpaired", "sft", "prompts") if kind in kinds)
    return (*READING, f"tokenize_data@{kind}")


def as_json_lines(rows: Rows) -> bytes:
    return "".join(json_text(row) + "\n" for row in rows).encode()


def as_csv(rows: Rows) -> bytes:
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.writer(text)
    writer.writerow(columns)
    for row in rows:
        cells = (row.get(key) for key in columns)
        writer.writerow(["" if cell is None else cell if isinstance(cell, str) else json_text(cell) for cell in cells])
    return text.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(rows: Rows) -> bytes:
    made = io.BytesIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))  # pyarrow takes those of the first row alone
    pyarrow.parquet.write_table(pyarrow.table({key: [row.get(key) for row in rows] for key in columns}), made)
    return made.getvalue()


WRITERS: dict[str, Callable[[Rows], bytes]] = {
    "rows.jsonl": as_json_lines,
    "rows.json": lambda rows: json_text(rows).encode(),
    "rows.csv": as_csv,
    "rows.parquet": as_parquet,
    "rows.jsonl.gz": lambda rows: gzip.compress(as_json_lines(rows), mtime=0),
    "rows.csv.gz": lambda rows: gzip.compress(as_csv(rows), mtime=0),
}


def case(what: str, name: str, content: bytes, file: str, expected: Expected = "either", **changed: Any) -> Case:
    path = f"data/raw/{file}"
    settings = settings_for(name, path, **changed)
    stages = stages_for(settings["prepare_data"]["kinds"])
    return Case(what, lambda folder: put(folder / path, content), stages, expected, settings)


def named_row(what: str, name: str, rows: Rows, expected: Expected, changed: dict[str, Any]) -> Case:
    before = [row | {"label": True} for row in sound(name)] if "unpaired" in changed.get("kinds", ()) else sound(name)
    return case(f"{name}: {what}", name, as_json_lines([*before, *rows]), "rows.jsonl", expected, **changed)


def text_file(what: str, file: str, content: str | bytes, expected: Expected = "refused", name: str = "hh") -> Case:
    return case(f"{file}: {what}", name, content if isinstance(content, bytes) else content.encode(), file, expected)


PAIR = json.dumps(sound("preference")[0])
ONE_CSV = as_csv(sound("preference")).decode()
TEXTS = (
    text_file("a key twice in one row", "rows.jsonl", PAIR[:-1] + ', "chosen": "Another."}\n'),
    text_file("a key twice within a message", "rows.jsonl", '{"messages": [{"role": "user", "role": "system"}]}\n'),
    text_file("a column twice in the header", "rows.csv", "prompt,chosen,rejected,chosen\na?,b,c,d\n"),
    text_file("an empty column name", "rows.csv", "prompt,chosen,rejected,\na?,b,c,d\n"),
    text_file("only a header", "rows.csv", "prompt,chosen,rejected\n"),
    text_file("a NUL in a cell", "rows.csv", ONE_CSV + 'x?,"a\0",b\n', "either", "preference"),
    text_file("an open quote", "rows.csv", ONE_CSV + '"x?,a,b\n'),
    text_file("messages as JSON text in a cell", "rows.csv", as_csv(sound("preference_chat")), "either", "preference"),
    text_file("a newline in a column's name", "rows.csv", '"pro\nmpt",x\na,b\n'),
    text_file("a newline in a key", "rows.jsonl", '{"a\\nerror: b": 1}\n'),
    text_file("a cell of 200,000 characters", "rows.csv", ONE_CSV + f"y?,{'a ' * 100_000},b\n", "either", "preference"),
    text_file(
        f"a {DIGITS}-digit integer in a column of its own", "rows.jsonl", PAIR[:-1] + f', "id": {"9" * DIGITS}}}\n'
    ),
    text_file(f"a {DIGITS}-digit integer in an array of rows", "rows.json", f'[{PAIR[:-1]}, "id": {"9" * DIGITS}}}]'),
    text_file("a 401-digit margin", "rows.jsonl", PAIR[:-1] + f', "margin": {"9" * 401}}}\n', "refused", "preference"),
    text_file("100,000 nested brackets", "rows.jsonl", "[" * 100_000 + "\n"),
    text_file("100,000 nested brackets", "rows.json", "[" * 100_000),
    text_file("100,000 nested brackets in a column", "rows.jsonl", f'{{"chosen": {"[" * 100_000}{"]" * 100_000}}}\n'),
    text_file("nested mappings", "rows.json", '[{"a":' * 50_000),
    text_file("an unknown type", "rows.xml", "<rows/>"),
    text_file("no name ending", "rows", PAIR),
    text_file("Latin-1", "rows.jsonl", '{"chosen": "é"}'.encode("latin-1")),
    text_file("UTF-16", "rows.jsonl", PAIR.encode("utf-16")),
    text_file("nothing", "rows.jsonl", ""),
    text_file("an empty array", "rows.json", "[]"),
    text_file("an object, not an array", "rows.json", '{"rows": [1]}'),
    text_file("numbers", "rows.json", "[1, 2]"),
    text_file("NaN as the margin", "rows.jsonl", PAIR[:-1] + ', "margin": NaN}\n'),
    text_file("not gzip", "rows.jsonl.gz", PAIR),
    text_file("half a gzip file", "rows.jsonl.gz", gzip.compress(PAIR.encode() * 99, mtime=0)[:40]),
    text_file("not Parquet", "rows.parquet", b"PAR1" + bytes(40) + b"PAR1"),
)


def parquet(what: str, table: Callable[[], pyarrow.Table], expected: Expected = "refused") -> Case:
    def prepare(folder: Path) -> None:
        (folder / "data/raw").mkdir(parents=True)
        pyarrow.parquet.write_table(table(), folder / "data/raw/rows.parquet")

    settings = settings_for("preference", "data/raw/rows.parquet")
    stages = (*READING, "tokenize_data@preference")
    return Case(f"rows.parquet: {what}", prepare, stages, expected, settings)


def columns(**extra: Any) -> dict[str, list[Any]]:
    rows = sound("preference")
    return {key: [row[key] for row in rows] for key in ("prompt", "chosen", "rejected")} | {
        key: [value] * len(rows) for key, value in extra.items()
    }


def not_utf8() -> pyarrow.Table:
    values = columns()
    broken = pyarrow.array([text.encode() for text in values["chosen"][:-1]] + [b"\xff\xfe"], pyarrow.binary())
    return pyarrow.table({**values, "chosen": broken.view(pyarrow.string())})


def column_twice() -> pyarrow.Table:
    values = columns()
    return pyarrow.table([*values.values(), values["rejected"]], names=[*values, "chosen"])


TABLES = (
    parquet("text that is not UTF-8", not_utf8),
    parquet("a column twice", column_twice),
    parquet("a binary column", lambda: pyarrow.table(columns() | {"chosen": [b"a", b"b", b"c", b"d", b"e", b"f"]})),
    parquet("a margin that is a decimal", lambda: pyarrow.table(columns(margin=1.5)), "accepted"),
    parquet("a margin of -1", lambda: pyarrow.table(columns(margin=-1.0))),
    parquet("no rows", lambda: pyarrow.table(columns()).slice(0, 0)),
    parquet("a column of images", lambda: pyarrow.table(columns(images=b"x"))),
)


def folder_case(what: str, prepare: Callable[[Path], None], expected: Expected = "refused", **more: Any) -> Case:
    def with_rows(folder: Path) -> None:
        put(folder / FOLDER / "a.jsonl", as_json_lines(sound("preference")))
        prepare(folder / FOLDER)

    return Case(f"a folder with {what}", with_rows, READING, expected, settings_for("hh", FOLDER), **more)


def linked_folder(raw: Path) -> None:
    put(raw.parent / "elsewhere/b.jsonl", '{"chosen": ')
    (raw / "linked").symlink_to(raw.parent / "elsewhere")


def link_in_a_circle(raw: Path) -> None:
    (raw / "again").symlink_to(raw)


def unreadable(raw: Path) -> None:
    (raw / "a.jsonl").chmod(0)


FOLDERS = (
    folder_case("a dangling link", lambda raw: (raw / "b.jsonl").symlink_to("nowhere")),
    folder_case("a FIFO", lambda raw: os.mkfifo(raw / "b.jsonl")),
    folder_case("a linked folder that holds a broken file", linked_folder),
    folder_case("a link to itself", link_in_a_circle, "either"),
    folder_case("a file of unknown type", lambda raw: put(raw / "b.xml", "<a/>")),
    folder_case("an empty file", lambda raw: put(raw / "b.jsonl", "")),
    folder_case("a hidden broken file", lambda raw: put(raw / ".b.jsonl", "{"), "either"),
    folder_case("a README", lambda raw: put(raw / "README.md", "# Data"), "accepted"),
    folder_case("a file that cannot be read", unreadable, unprivileged=True),
    folder_case("a closed folder", lambda raw: raw.chmod(0), unprivileged=True),
    folder_case("a folder in it that is closed", lambda raw: (raw / "b").mkdir(mode=0), unprivileged=True),
    folder_case("a newline in a file's name", lambda raw: put(raw / "a\nerror: b.jsonl", "{")),
    folder_case("rows of two formats", lambda raw: put(raw / "b.jsonl", as_json_lines(sound("alpaca")))),
)
NAMES = (
    "my data.jsonl",
    "train (1).jsonl",
    "it's.jsonl",
    "a$b.jsonl",
    '$(touch pwned)".jsonl',
    "; touch pwned.jsonl",
    "é.jsonl",
)
FILES = tuple(
    case(f"a file called {file}", "preference", as_json_lines(sound("preference")), file, "accepted") for file in NAMES
)


def mutated(draw: random.Random) -> Case:
    """Sound rows of one format, of which one row or the file was changed in one place."""
    name = draw.choice([*KINDS])
    rows = sound(name)
    file = draw.choice(("rows.jsonl", "rows.jsonl", *WRITERS))
    given = {"format": FORMAT_OF.get(name, name)} if draw.random() < 0.7 else {}
    if draw.random() < 0.15:
        what, content = mutated_bytes(WRITERS[file](rows), draw)
        return case(f"{name} in {file}, which {what}", name, content, file, **given)
    number = draw.randrange(len(rows))
    what, rows[number] = mutated_tree(rows[number], draw)
    try:
        content = WRITERS[file](rows)
    except (pyarrow.ArrowException, UnicodeEncodeError, AttributeError, TypeError, OverflowError):
        file = "rows.jsonl"  # this kind of file cannot hold it
        content = as_json_lines(rows)
    return case(f"{name} in {file}, row {number + 1}: {what}", name, content, file, **given)


FORMAT_OF = {"preference_chat": "preference"}
AREA = Area(
    needs=("models/base",),
    named=(*(named_row(*row) for row in NAMED_ROWS), *TEXTS, *TABLES, *FOLDERS, *FILES),
    mutated=mutated,
    share=0.15,
)
