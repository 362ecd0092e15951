"""Reference log-probs that are not those of the policy before its first step."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow

from tests.fuzz.areas.tables import Columns, read, rewritten, write
from tests.fuzz.case import Area, Case, Expected, nothing, put
from tests.fuzz.mutations import mutated_bytes

CHOSEN, REJECTED = "reference_chosen_logps", "reference_rejected_logps"
FOLDER = "data/ref_logprobs/sft"
STAGE = "train_dpo@dpo"
SPLITS = ("train", "validation")
BF16 = {"precision": "bf16"}


def case(what: str, split: str, change: Callable[[Columns], None], expected: Expected = "refused") -> Case:
    def prepare(folder: Path) -> None:
        rewritten(folder / FOLDER / f"{split}.arrow", change)

    return Case(f"{split}: {what}", prepare, (STAGE,), expected)


def one(column: str, value: Any, row: int = 3) -> Callable[[Columns], None]:
    def change(columns: Columns) -> None:
        columns[column][row] = value

    return change


def all_of(make: Callable[[float], float], *names: str) -> Callable[[Columns], None]:
    def change(columns: Columns) -> None:
        for name in names or (CHOSEN, REJECTED):
            columns[name] = [make(value) for value in columns[name]]

    return change


def rolled(columns: Columns) -> None:
    for name in (CHOSEN, REJECTED):
        columns[name] = columns[name][1:] + columns[name][:1]


def exchanged(columns: Columns) -> None:
    columns[CHOSEN], columns[REJECTED] = columns[REJECTED], columns[CHOSEN]


CHANGES: tuple[tuple[str, Callable[[Columns], None]], ...] = (
    ("shifted by -500", all_of(lambda value: value - 500)),
    ("shifted by -0.1", all_of(lambda value: value - 0.1)),
    ("the chosen ones shifted by -5", all_of(lambda value: value - 5, CHOSEN)),
    ("rolled by one row", rolled),
    ("chosen and rejected exchanged", exchanged),
    ("all +100", all_of(lambda _: 100.0)),
    ("all 0", all_of(lambda _: 0.0)),
    ("scaled by 1.01", all_of(lambda value: value * 1.01)),
    ("all -3e38", all_of(lambda _: -3e38)),
    *((f"one {value}", one(CHOSEN, value)) for value in (float("nan"), float("inf"), float("-inf"), None, 0.5, 1e-30)),
    *((f"one rejected {value}", one(REJECTED, value)) for value in (float("nan"), None, 1.0)),
    ("a null row", one("row", None)),
    ("a row number twice", one("row", 0)),
)


def another_model(folder: Path) -> None:
    """The model that DPO starts from has become another one since its log-probs were computed."""
    (folder / "models/sft").rename(folder / "models/kept")
    (folder / "models/ppo").rename(folder / "models/sft")


def notes(what: str, change: dict[bytes, bytes] | None, expected: Expected = "refused") -> Case:
    def prepare(folder: Path) -> None:
        path = folder / FOLDER / "train.arrow"
        table = read(path)
        kept = dict(table.schema.metadata or {})
        write(path, table.replace_schema_metadata(None if change is None else {**kept, **change}))

    return Case(what, prepare, (STAGE,), expected)


def schema(what: str, change: Callable[[pyarrow.Table], pyarrow.Table], expected: Expected = "refused") -> Case:
    def prepare(folder: Path) -> None:
        path = folder / FOLDER / "train.arrow"
        write(path, change(read(path)))

    return Case(what, prepare, (STAGE,), expected)


def swap_splits(folder: Path) -> None:
    paths = [folder / FOLDER / f"{split}.arrow" for split in SPLITS]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        put(path, content)


def of_another_reference(what: str, prepare: Callable[[Path], object], expected: Expected, **dpo: Any) -> Case:
    """A reference that is not the model that DPO starts from: its numbers need not agree with that one's."""
    settings = {"ref_logprobs": {"other": {"model": "models/ppo", "precision": "fp32", "base_quantization": None}}}
    settings["train_dpo"] = {"dpo": {"reference": "data/ref_logprobs/other", **dpo}}
    return Case(f"of another model: {what}", prepare, ("ref_logprobs@other", STAGE), expected, settings)


REFERENCES: tuple[tuple[str, Callable[[Path], object], Expected], ...] = (
    ("nothing wrong", nothing, "accepted"),
    ("the model is gone", lambda folder: shutil.rmtree(folder / "models/ppo"), "refused"),
    ("its tokenizer is another one", lambda folder: other_tokenizer(folder / "models/ppo"), "refused"),
)


def other_tokenizer(model: Path) -> None:
    """The ids of two words of the tokenizer exchanged."""
    values = json.loads((model / "tokenizer.json").read_text())
    words = values["model"]["vocab"]
    first, second = [word for word in words if len(word) > 1][:2]
    words[first], words[second] = words[second], words[first]
    put(model / "tokenizer.json", json.dumps(values))


def other_pairs(folder: Path) -> None:
    """Tokens of other pairs in as many rows: what ONLY=1 may bring together."""
    rewritten(folder / "data/tokens/train/preference.arrow", lambda columns: columns["rejected_ids"].reverse())


NAMED = (
    *(case(what, split, change) for split in SPLITS for what, change in CHANGES),
    Case("the SFT model is another than that of the log-probs", another_model, (STAGE,), "refused"),
    Case("tokens of other pairs", other_pairs, (STAGE,), "refused"),
    Case("train and validation exchanged", swap_splits, (STAGE,), "refused"),
    Case("nothing wrong", nothing, (STAGE,), "accepted"),
    Case("bf16 with log-probs in fp32", nothing, (STAGE,), "refused", {"train_dpo": {"dpo": BF16}}),
    Case(
        "ref_logprobs and train_dpo in bf16",
        nothing,
        ("ref_logprobs@sft", STAGE),
        "accepted",
        {"train_dpo": {"dpo": BF16}, "ref_logprobs": {"sft": BF16}},
    ),
    *(of_another_reference(*given) for given in REFERENCES),
    notes("no notes", None),
    notes("a note of the precision that is not UTF-8", {b"precision": b"\xff"}),
    notes("a note of another precision", {b"precision": b"bf16"}),
    notes("a note of the precision with a newline", {b"precision": b"a\nerror: b"}),
    schema("64-bit log-probs", lambda table: table.set_column(1, CHOSEN, table[1].cast(pyarrow.float64()))),
    schema("one row less", lambda table: table.slice(1)),
    schema("no rows", lambda table: table.slice(0, 0)),
    schema("a column missing", lambda table: table.drop_columns([REJECTED])),
)


def mutated(draw: random.Random) -> Case:
    """One value shifted, or damaged bytes."""
    split = draw.choice(SPLITS)
    if draw.random() < 0.4:
        place = draw.random()

        def damage(folder: Path) -> None:
            path = folder / FOLDER / f"{split}.arrow"
            put(path, mutated_bytes(path.read_bytes(), random.Random(place))[1])

        return Case(f"{split}: damaged file ({place})", damage, (STAGE,))
    column, row = draw.choice((CHOSEN, REJECTED)), draw.randrange(8)
    shift = draw.choice((1, -1)) * 10 ** draw.uniform(-1, 4)

    def change(columns: Columns) -> None:
        columns[column][row] += shift

    return case(f"{column} of row {row} shifted by {shift:.3g}", split, change, "either")


AREA = Area(needs=("data", "models"), named=NAMED, mutated=mutated, share=0.04)
