"""Settings of sources that contradict each other, the data or what is there."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stages.lib.settings.declaration import block
from stages.lib.settings.prepare_data import Decontamination
from stages.lib.settings.sources import FileSource, HubSource
from tests.fuzz.areas.comparisons import settings_for
from tests.fuzz.areas.comparisons import sound as sound_comparison
from tests.fuzz.areas.params import CHECK, MISSING, with_value
from tests.fuzz.areas.raw_rows import sound as sound_rows
from tests.fuzz.areas.rows import as_json_lines
from tests.fuzz.case import Area, Case, Expected, Whole, put
from tests.fuzz.mutations import ODD_VALUES, yaml_text

Row = dict[str, Any]
PATH = "data/raw/rows.jsonl"
READ = (*CHECK, "read_source@mine", "prepare_data")
KINDS = ["sft", "preference", "prompts"]


def file_source(**changed: Any) -> Row:
    return block(FileSource) | {"path": PATH, "kinds": KINDS} | changed


def project(files: Mapping[str, Any], **data: Any) -> Row:
    """The settings of these sources alone, from which nothing but SFT is made unless `kinds` says more."""
    data = {"kinds": KINDS, "validation_fraction": 0.2, "test_fraction": 0.2} | data
    return {"sources": Whole(files=dict(files), hub={}, tasks={}, arithmetic={}), "prepare_data": data}


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
        {
            "sources": Whole(
                files={"mine": file_source()}, hub={"other": block(HubSource) | said}, tasks={}, arithmetic={}
            )
        },
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
    named=(*SETTINGS, *OF_HUB, *DECONTAMINATION),
    systematic=SYSTEMATIC,
    mutated=mutated,
    share=0.04,
    may_run_on=True,
)
