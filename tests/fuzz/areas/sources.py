"""Settings of sources that contradict each other or the data, mixtures of sources, and what is left out of them."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stages.lib.settings.declaration import block
from stages.lib.settings.prepare_data import Decontamination, NearDuplicates
from stages.lib.settings.sources import FileSource, HubSource
from tests.fuzz.areas.comparisons import settings_for
from tests.fuzz.areas.comparisons import sound as sound_comparison
from tests.fuzz.areas.params import CHECK, MISSING, with_value
from tests.fuzz.areas.raw_rows import assistant, user
from tests.fuzz.areas.raw_rows import sound as sound_rows
from tests.fuzz.areas.rows import as_json_lines
from tests.fuzz.case import Area, Case, Complaint, Expected, Whole, no_complaint, put
from tests.fuzz.mutations import ODD_VALUES, json_text, yaml_text

Row = dict[str, Any]
PATH = "data/raw/rows.jsonl"
READ = (*CHECK, "read_source@mine", "prepare_data")
KINDS = ["sft", "preference", "prompts"]


def file_source(**changed: Any) -> Row:
    return block(FileSource) | {"path": PATH, "kinds": KINDS} | changed


def project(files: Mapping[str, Any], **data: Any) -> Row:
    """The settings of these sources alone, from which nothing but SFT is made unless `kinds` says more."""
    data = {"kinds": KINDS, "validation_fraction": 0.2, "test_fraction": 0.2} | data
    return {"sources": Whole(files=dict(files), hub={}, tasks={}), "prepare_data": data}


def with_rows(rows: list[Row]) -> Callable[[Path], None]:
    return lambda folder: put(folder / PATH, as_json_lines(rows))


def setting(what: str, expected: Expected, own_rows: list[Row] | None = None, **changed: Any) -> Case:
    """One source of pairs with settings of its own."""
    given = sound_rows("preference") if own_rows is None else own_rows
    return Case(f"a source with {what}", with_rows(given), READ, expected, project({"mine": file_source(**changed)}))


def marked(**more: Any) -> list[Row]:
    return [row | more for row in sound_rows("preference")]


WRONG: tuple[Mapping[str, Any], ...] = (
    {"weight": 1.0, "rows": 5},
    {"split": "test", "weight": 1.0},
    {"split": "validation", "rows": 5},
    {"split": "eval"},
    {"kinds": []},
    {"kinds": ["sft", "sft"]},
    {"kinds": ["sft", "chat"]},
    {"kinds": ["sft"]},  # and no source serves the others
    {"format": "alpaca"},
    {"format": "alpaca", "kinds": ["sft", "prompts"]},
    {"format": "text"},
    {"format": "hh"},
    {"format": "no_such"},
    {"format": "comparison"},
    {"columns": {"nothing": "chosen"}},
    {"columns": {"chosen": "rejected", "rejected": "rejected"}},
    {"columns": {"chosen": "a column that no format reads"}},
    {"columns": {"prompt": "chosen"}},
    {"columns": {"": "prompt"}},
    {"columns": {"x\nerror: y": "prompt"}},
    {"columns": {"prompt": "prompt"}, "ignore_columns": ["prompt"]},
    {"ignore_columns": ["prompt"]},
    {"ignore_columns": ["nothing"]},
    {"ignore_columns": ["\ud800"]},
    {"facts": ["nothing"]},
    {"facts": ["prompt", "prompt"]},
    {"facts": ["prompt"], "ignore_columns": ["prompt"]},
    {"facts": [""]},
    {"task": "no_such"},
    {"task": "film_reviews"},  # whose facts no column holds
    {"task": "film_reviews", "kinds": ["sft", "preference"]},
    {"max_rows": 0},
    {"max_rows": 1},
    {"rows_key": "data"},
    {"delimiter": "|"},
    {"delimiter": ";"},
    {"on_unusable_row": "skip"},
    {"weight": 0.0},
    {"weight": -1.0},
    {"weight": float("nan")},
    {"weight": 1e300},
    {"rows": 0},
    {"path": ""},
    {"path": "data/raw/none.jsonl"},
    {"path": "data/raw/../raw/rows.jsonl"},
    {"path": "data/sources"},
    {"path": "data/sources/mine/rows.jsonl"},
    {"path": "data/prepared/train/sft.jsonl"},
    {"path": "data"},
    {"path": "."},
    {"path": "/"},
    {"path": "metrics/read_source"},
    {"path": "/dev/stdin"},
    {"path": "data/raw/rows.jsonl\0"},
    {"path": "~/rows.jsonl"},
    {"path": "$(touch pwned)"},
    {"path": "data/raw/rows.jsonl; touch pwned"},
    {"path": "${sources}"},
    {"path": "https://example.org/rows.jsonl"},
)
RIGHT: tuple[Mapping[str, Any], ...] = (
    {},
    {"format": "preference"},
    {"weight": 1e-9},
    {"weight": 1e9},
    {"rows": 1},
    {"rows": 2**31 - 1},
    {"max_rows": 6},
    {"facts": ["prompt"]},
    {"columns": {"prompt": "prompt"}},
    {"on_unusable_row": "drop"},
    {"input_template": "{{}} {}"},
)
SETTINGS = (
    *(setting(f"{said}"[:90], "refused", **said) for said in WRONG),
    *(setting(f"{said}"[:90], "accepted", **said) for said in RIGHT),
    setting("a fact that is a number", "accepted", marked(id=5), facts=["id"]),
    setting("a fact with NaN", "either", marked(id=float("nan")), facts=["id"]),
    setting("a fact named text", "either", marked(text="x"), facts=["text"]),
    setting(
        "a fact named kind", "accepted", marked(kind="x", split="test", source="y"), facts=["kind", "split", "source"]
    ),
    setting("columns named kind and split", "accepted", marked(kind="sft", split="test", source="y")),
    setting(
        "the facts of the task",
        "accepted",
        marked(film="night", genre="war", aspect="plot"),
        task="film_reviews",
        facts=["film", "genre", "aspect"],
    ),
    setting("a fact that is the task", "either", marked(task="no_such"), facts=["task"]),
    setting(
        "a winner beside renamed replies",
        "refused",
        [{"prompt": f"{n}?", "a": "x", "b": "y", "better": n % 2} for n in range(8)],
        columns={"a": "chosen", "b": "rejected"},
    ),
    setting(
        "a winner that is ignored",
        "accepted",
        [{"prompt": f"{n}?", "a": "x", "b": "y", "better": n % 2} for n in range(8)],
        columns={"a": "chosen", "b": "rejected"},
        ignore_columns=["better"],
    ),
)
# What a Hub source may not say, before anything is asked of the network.
HUB: tuple[Mapping[str, Any], ...] = (
    *({"dataset": value} for value in ("", "a/b/c", "../x", "a b", "a/b;touch pwned", "https://x.org/a", 5, None)),
    *({"revision": value} for value in ("main", "", "0" * 39, "0" * 41, "G" * 40, "A" * 40, 0, None)),
    *({"hub_split": value} for value in ("train[", "train[:x]", "train[5:2]", "train+test[:", "", "train]", "[:5]", 5)),
    *({"data_dir": value} for value in ("", 5, "x\0")),
    *({"streaming": value} for value in (None, 1, "true")),
    {"hub_split": "train[:50%]", "streaming": True},
)
OF_HUB = tuple(
    Case(
        f"a Hub source with {said}"[:90],
        with_rows(sound_rows("preference")),
        CHECK,
        "refused",
        {"sources": Whole(files={"mine": file_source()}, hub={"other": block(HubSource) | said}, tasks={})},
    )
    for said in HUB
)


def usual_mistakes(settings: Row, path: tuple[str, ...], rows: list[Row]) -> list[Case]:
    """A key of a source that is missing or of another type."""
    return [
        Case(
            f"{'.'.join(path[3:])} ({settings_name(settings)}) {what}",
            with_rows(rows),
            (*CHECK, "read_source@mine"),
            expected,
            settings | {"sources": Whole(with_value(settings["sources"], path[1:], value))},
        )
        for what, value, expected in (
            ("is missing", MISSING, "refused"),
            ("is null", None, "either"),
            ("is a list in a list", [[1]], "refused"),
            ("is -1", -1, "either"),
            ("is NaN", float("nan"), "refused"),
        )
    ]


def settings_name(settings: Row) -> str:
    comparison = settings["sources"]["files"]["mine"]["comparison"]
    return "none" if comparison is None else str(comparison["type"])


MINE = ("sources", "files", "mine")
SYSTEMATIC = (
    *(
        one
        for key in file_source()
        for one in usual_mistakes(project({"mine": file_source()}), (*MINE, key), sound_rows("preference"))
    ),
    *(
        one
        for shape in ("winner", "objects", "order", "tree", "flat")
        for key in settings_for(shape, PATH)["sources"]["files"]["mine"]["comparison"]
        for one in usual_mistakes(
            settings_for(shape, PATH, kinds=KINDS), (*MINE, "comparison", key), sound_comparison(shape)
        )
    ),
)


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
    {"kind": "sft", "messages": []},
    {"kind": "sft", "messages": [{"role": 5, "content": 5}]},
    {"kind": "sft", "prompt": []},
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
DECONTAMINATION = tuple(
    Case(
        f"decontamination {said}",
        with_rows(sound_rows("preference")),
        CHECK,
        "refused",
        project({"mine": file_source()}, decontamination=block(Decontamination) | said),
    )
    for said in (
        {"sources": []},
        {"sources": ["mine"]},  # which is not of split test
        {"sources": ["mien"]},
        {"sources": ["mine", "mine"]},
        {"sources": "mine"},
        {"sources": [""]},
        {"words": 0},
        {"overlap": 0.0},
        {"overlap": 2.0},
    )
)
ODD = (
    *(prepared(f"a row {row!r}"[:70], {"one": [*ONE, row], "two": TWO}, "refused") for row in ODD_ROWS),
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
    """Two keys of a source with odd values."""
    changed = {draw.choice([*file_source()]): draw.choice(ODD_VALUES)[1] for _ in range(2)}
    changed = {key: value for key, value in changed.items() if key != "path" or draw.random() < 0.5}
    names = ", ".join(f"{key} {value!r:.30}" for key, value in changed.items())
    source = file_source(**changed)

    def prepare(folder: Path) -> None:
        put(folder / PATH, as_json_lines(sound_rows("preference")))
        settings = json.loads((folder / "params.yaml").read_text())
        settings["sources"]["files"]["mine"] = source
        put(folder / "params.yaml", yaml_text(settings))

    return Case(f"a source with {names}", prepare, READ, "either", project({"mine": file_source()}))


AREA = Area(
    needs=("models",),
    named=(*SETTINGS, *OF_HUB, *MIXTURES, *DECONTAMINATION, *ODD, *LEFT_OVER),
    systematic=SYSTEMATIC,
    mutated=mutated,
    share=0.06,
    may_run_on=True,
)
