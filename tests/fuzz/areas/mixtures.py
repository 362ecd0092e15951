"""Rows of several sources as prepare_data meets them: mixtures, leaks, near duplicates, and rows that nobody wrote."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stages.lib.settings.declaration import block
from stages.lib.settings.prepare_data import Decontamination, NearDuplicates
from tests.fuzz.areas.raw_rows import assistant, user
from tests.fuzz.areas.sources import Row, file_source, project
from tests.fuzz.case import Area, Case, Complaint, Expected, no_complaint, put
from tests.fuzz.mutations import json_text, mutated_tree


def prepared(
    what: str, sources: Mapping[str, Any], expected: Expected, complaint: Complaint = no_complaint, **data: Any
) -> Case:
    """Rows that read_source has left, by source; a value that is text is the file as it is."""

    def prepare(folder: Path) -> None:
        for name, rows in sources.items():
            text = rows if isinstance(rows, str | bytes) else "".join(json_text(row) + "\n" for row in rows)
            put(folder / f"data/sources/{name}/rows.jsonl", text)

    shares = data.pop("shares", {})
    files = {name: file_source(kinds=["sft"]) | shares.get(name, {}) for name in ("one", "two")}
    settings = project(files, kinds=["sft"], **data)
    return Case(f"prepare_data: {what}", prepare, ("prepare_data",), expected, settings, complaint=complaint)


def said(number: int, words: str = "", **more: Any) -> Row:
    return {"kind": "sft", "messages": [user(f"Question {number} {words}?"), assistant(f"A {number}.")], **more}


def some(count: int, start: int = 0) -> list[Row]:
    return [said(number) for number in range(start, start + count)]


ONE, TWO = some(20), some(20, 100)


def train_rows(one: int, two: int) -> Complaint:
    """How many rows of each source are drawn, none in two splits and none twice."""

    def complaint(folder: Path, accepted: bool) -> str | None:
        if not accepted:
            return None
        splits = {
            split: [json.loads(line) for line in (folder / f"data/prepared/{split}/sft.jsonl").read_text().splitlines()]
            for split in ("train", "validation", "test")
        }
        texts = [row["messages"][0]["content"] for rows in splits.values() for row in rows]
        found = tuple(sum(row["source"] == name for row in splits["train"]) for name in ("one", "two"))
        if len(set(texts)) < len(texts):
            return "a row stands in two splits, or twice in one"
        return None if found == (one, two) else f"{found} train rows, not {(one, two)}"

    return complaint


NO_DUPLICATES = {"near_duplicates": block(NearDuplicates)}
CLEAN = {"decontamination": block(Decontamination) | {"sources": ["two"]}}
TEST = {"two": {"split": "test"}}
ODD_ROWS: tuple[Row, ...] = (
    {},
    {"messages": []},
    {"kind": "sft"},
    {"kind": "chat", "messages": []},
    {"kind": ["sft"], "messages": []},
    {"kind": None, "messages": []},
    {"kind": "sft", "messages": 5},
    {"kind": "sft", "messages": None},
    {"kind": "sft", "messages": [5]},
    {"kind": "sft", "messages": [{}]},
    {"kind": "sft", "messages": [{"role": 5, "content": 5}]},
    {"kind": "sft", "text": 5},
    {"kind": "sft", "text": "\ud800"},
    said(5, split="eval"),
    said(5, split=["test"]),
    said(5, split=5),
)
MIXTURES = (
    prepared("two sources", {"one": ONE, "two": TWO}, "accepted"),
    prepared("the same rows twice", {"one": ONE, "two": ONE}, "accepted"),
    prepared(
        "weights of 1 and 1",
        {"one": ONE, "two": some(40, 100)},
        "accepted",
        shares={"one": {"weight": 1.0}, "two": {"weight": 1.0}},
    ),
    prepared(
        "weights far apart",
        {"one": ONE, "two": TWO},
        "accepted",
        shares={"one": {"weight": 1e-9}, "two": {"weight": 1e9}},
    ),
    prepared(
        "splits and weights",
        {
            "one": [*(said(n, split="train") for n in range(8)), said(50, split="validation"), said(51, split="test")],
            "two": [said(n, split="train") for n in range(100, 120)],
        },
        "accepted",
        train_rows(8, 4),
        shares={"one": {"weight": 1.0}, "two": {"weight": 0.5}},
    ),
    prepared(
        "splits and rows",
        {
            "one": [*(said(n, split="train") for n in range(8)), said(50, split="validation"), said(51, split="test")],
            "two": [said(n, split="train") for n in range(100, 120)],
        },
        "accepted",
        train_rows(3, 20),
        shares={"one": {"rows": 3}, "two": {"rows": 99}},
    ),
    prepared(
        "a leak from test into train",
        {
            "one": [*(said(n, split="train") for n in range(8)), said(50, split="validation"), said(3, split="test")],
            "two": [said(100, split="train")],
        },
        "accepted",
        train_rows(7, 1),
    ),
    prepared(
        "all train rows are in test, too",
        {
            "one": [said(3, split="train"), said(50, split="validation"), said(3, split="test")],
            "two": [said(3, split="train")],
        },
        "refused",
    ),
    prepared("one prompt alone", {"one": [said(1)], "two": [said(1)]}, "refused"),
    prepared("two prompts", {"one": [said(1)], "two": [said(2)]}, "refused"),
    prepared("three prompts", {"one": [said(1)], "two": [said(2), said(3)]}, "accepted"),
    prepared("no share is held out", {"one": ONE, "two": TWO}, "refused", validation_fraction=0.0, test_fraction=0.0),
    prepared("a validation split of nothing", {"one": ONE, "two": TWO}, "refused", validation_fraction=0.0),
    prepared(
        "all but nothing is held out", {"one": ONE, "two": TWO}, "accepted", validation_fraction=0.5, test_fraction=0.49
    ),
    prepared(
        "a source of another kind alone", {"one": ONE, "two": [{"kind": "prompts", "prompt": [user("Q?")]}]}, "accepted"
    ),
    prepared(
        "rows that are nearly alike",
        {"one": [said(n % 3, " ".join(f"word{k}" for k in range(40)) + f" {n}") for n in range(30)], "two": TWO},
        "accepted",
        **NO_DUPLICATES,
    ),
    prepared(
        "all rows are nearly alike",
        {
            "one": [
                said(0, " ".join(f"word{k}" for k in range(80)) + f" {n}", split=split)
                for n, split in enumerate(("train", "train", "validation", "test"))
            ],
            "two": [said(0, " ".join(f"word{k}" for k in range(80)) + " x", split="train")],
        },
        "accepted",
        train_rows(1, 0),
        **NO_DUPLICATES,
    ),
    prepared(
        "a text without words",
        {
            "one": [*ONE, *({"kind": "sft", "text": text} for text in ("\u200b", "...", "\n", "!" * 9, "\0"))],
            "two": TWO,
        },
        "accepted",
        **NO_DUPLICATES,
    ),
    prepared(
        "a text of 1,000,000 words",
        {"one": [*ONE, {"kind": "sft", "text": "word " * 1_000_000}], "two": TWO},
        "accepted",
        **NO_DUPLICATES,
    ),
    prepared(
        "words of one letter and 1,024 permutations",
        {"one": ONE, "two": TWO},
        "accepted",
        near_duplicates={"similarity": 1.0, "words": 1, "permutations": 1024},
    ),
    *(
        prepared(
            f"near duplicates by {values}",
            {"one": ONE, "two": TWO},
            "refused",
            near_duplicates=block(NearDuplicates) | values,
        )
        for values in (
            {"similarity": 0.0},
            {"similarity": 1.1},
            {"words": 0},
            {"permutations": 2},
            {"similarity": float("nan")},
        )
    ),
    *(
        prepared(
            f"near duplicates by {values}",
            {"one": ONE, "two": TWO},
            "accepted",
            near_duplicates=block(NearDuplicates) | values,
        )
        for values in (
            {"similarity": 1e-9},
            {"similarity": 1e-3, "permutations": 16},
            {"similarity": 1.0},
            {"words": 1000},
            {"similarity": 0.999999, "permutations": 16},
        )
    ),
    prepared(
        "test prompts in train rows",
        {
            "one": [*ONE, said(7, "is what they asked in the exam of the last year")],
            "two": [said(7, "is what they asked in the exam of the last year at noon")],
        },
        "accepted",
        shares=TEST,
        **CLEAN,
    ),
    prepared(
        "test prompts of one word",
        {"one": ONE, "two": [{"kind": "sft", "messages": [user("Question"), assistant("A.")]}]},
        "either",
        shares=TEST,
        **CLEAN,
    ),
    prepared(
        "a test source without rows of a kind",
        {"one": ONE, "two": [{"kind": "prompts", "prompt": [user("Q?")]}]},
        "accepted",
        shares=TEST,
        **CLEAN,
    ),
)
ODD = (
    *(prepared(f"a row {row!r}"[:70], {"one": [*ONE, row], "two": TWO}, "refused") for row in ODD_ROWS),
    *(
        prepared(f"a row {row!r}"[:70], {"one": [*ONE, row], "two": TWO}, "either")  # tokenize refuses it
        for row in ({"kind": "sft", "messages": []}, {"kind": "sft", "prompt": []})
    ),
    *(
        prepared(f"rows that are {text[:20]!r}", {"one": ONE, "two": text}, "refused")
        for text in ("", "\n", "[]\n", "{\n", "null\n", "[" * 100_000, b"\xff\n", '{"kind": "sft", "kind": "sft"}\n')
    ),
    prepared("no rows of the second source", {"one": ONE}, "refused"),
)


def left_over(what: str, act: Callable[[Path], object], expected: Expected) -> Case:
    """Something else lies in the folder of all sources."""
    sound = prepared(what, {"one": ONE, "two": TWO}, expected)

    def prepare(folder: Path) -> None:
        sound.prepare(folder)
        act(folder / "data/sources")

    def complaint(folder: Path, _accepted: bool) -> str | None:
        kept = folder / "elsewhere/rows.jsonl"
        return "what lies elsewhere was removed" if kept.parent.exists() and not kept.exists() else None

    return sound._replace(what=f"data/sources holds {what}", prepare=prepare, complaint=complaint)


def link_elsewhere(sources: Path) -> None:
    put(sources.parents[1] / "elsewhere/rows.jsonl", "mine")
    (sources / "old").symlink_to(sources.parents[1] / "elsewhere")


LEFT_OVER = (
    left_over("rows of a source that is no more", lambda folder: put(folder / "old/rows.jsonl", "{}"), "accepted"),
    left_over("a file", lambda folder: put(folder / "old", "x"), "accepted"),
    left_over("a folder of something else", lambda folder: put(folder / "old/x", "x"), "accepted"),
    left_over("a link to a folder elsewhere", link_elsewhere, "either"),
    left_over("a dangling link", lambda folder: (folder / "old").symlink_to("nowhere"), "accepted"),
    left_over("a link to itself", lambda folder: (folder / "old").symlink_to("old"), "either"),
    left_over("a name with a newline", lambda folder: put(folder / "a\nerror: b/rows.jsonl", "{}"), "either"),
)


def mutated(draw: random.Random) -> Case:
    """One place of one row changed, or shares and fractions drawn."""
    if draw.random() < 0.5:
        what, row = mutated_tree(said(5, split="train"), draw)
        return prepared(f"a row: {what}", {"one": [*ONE, row], "two": TWO}, "either")
    shares = {
        name: draw.choice(({}, {"weight": 10 ** draw.uniform(-9, 9)}, {"rows": draw.randrange(1, 50)}))
        for name in ("one", "two")
    }
    fractions = {f"{split}_fraction": round(draw.random() * 0.6, 3) for split in ("validation", "test")}
    return prepared(f"{shares}, {fractions}", {"one": ONE, "two": TWO}, "either", shares=shares, **fractions)


AREA = Area(
    needs=("models",),
    named=(*MIXTURES, *ODD, *LEFT_OVER),
    mutated=mutated,
    share=0.03,
)
