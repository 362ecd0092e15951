"""Reference log-probs that are not those of the policy before its first step."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow

from tests.fuzz.areas.tables import Columns, read, rewritten, write
from tests.fuzz.case import Area, Case, Expected, put
from tests.fuzz.mutations import mutated_bytes

CHOSEN, REJECTED = "reference_chosen_logps", "reference_rejected_logps"
FOLDER = "data/ref_logprobs"
READ_BY = (("train_dpo", "train"), ("train_dpo", "eval"), ("evaluate@dpo", "eval"))


def case(what: str, stage: str, split: str, change: Callable[[Columns], None], expected: Expected = "refused") -> Case:
    def prepare(folder: Path) -> None:
        rewritten(folder / FOLDER / f"{split}.arrow", change)

    return Case(f"{stage}, {split}: {what}", prepare, (stage,), expected)


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


def of_another_model(stage: str) -> Case:
    """What ref_logprobs makes of models/dpo, under the name of that of models/sft."""

    def prepare(folder: Path) -> None:
        (folder / "models/sft").rename(folder / "models/kept")
        (folder / "models/ppo").rename(folder / "models/sft")

    return Case(f"{stage}: the SFT model is another than that of the log-probs", prepare, (stage,), "refused")


def notes(what: str, change: dict[bytes, bytes] | None, expected: Expected = "refused") -> Case:
    def prepare(folder: Path) -> None:
        path = folder / FOLDER / "train.arrow"
        table = read(path)
        kept = dict(table.schema.metadata or {})
        write(path, table.replace_schema_metadata(None if change is None else {**kept, **change}))

    return Case(f"train_dpo: {what}", prepare, ("train_dpo",), expected)


def schema(what: str, change: Callable[[pyarrow.Table], pyarrow.Table], expected: Expected = "refused") -> Case:
    def prepare(folder: Path) -> None:
        path = folder / FOLDER / "train.arrow"
        write(path, change(read(path)))

    return Case(f"train_dpo: {what}", prepare, ("train_dpo",), expected)


def swap_splits(folder: Path) -> None:
    paths = [folder / FOLDER / f"{split}.arrow" for split in ("train", "eval")]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        put(path, content)


def other_pairs(folder: Path) -> None:
    """Tokens of other pairs in as many rows: what ONLY=1 may bring together."""
    rewritten(folder / "data/tokens/preference/train.arrow", lambda columns: columns["rejected_ids"].reverse())


NAMED = (
    *(case(what, stage, split, change) for stage, split in READ_BY for what, change in CHANGES),
    of_another_model("train_dpo"),
    of_another_model("evaluate@dpo"),
    Case("train_dpo: tokens of other pairs", other_pairs, ("train_dpo",), "refused"),
    Case("train_dpo: train and eval exchanged", swap_splits, ("train_dpo",), "refused"),
    Case("train_dpo: nothing wrong", lambda _: None, ("train_dpo",), "accepted"),
    Case("evaluate: nothing wrong", lambda _: None, ("evaluate@dpo",), "accepted"),
    Case(
        "train_dpo in bf16 with log-probs in fp32",
        lambda _: None,
        ("train_dpo",),
        "refused",
        {"train_dpo": {"precision": "bf16"}},
    ),
    Case(
        "ref_logprobs and train_dpo in bf16",
        lambda _: None,
        ("ref_logprobs", "train_dpo"),
        "accepted",
        {"train_dpo": {"precision": "bf16"}, "ref_logprobs": {"precision": "bf16"}},
    ),
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
    stage, split = draw.choice(READ_BY)
    if draw.random() < 0.4:
        place = draw.random()

        def damage(folder: Path) -> None:
            path = folder / FOLDER / f"{split}.arrow"
            put(path, mutated_bytes(path.read_bytes(), random.Random(place))[1])

        return Case(f"{stage}, {split}: damaged file ({place})", damage, (stage,))
    column, row = draw.choice((CHOSEN, REJECTED)), draw.randrange(8)
    shift = draw.choice((1, -1)) * 10 ** draw.uniform(-1, 4)

    def change(columns: Columns) -> None:
        columns[column][row] += shift

    return case(f"{column} of row {row} shifted by {shift:.3g}", stage, split, change, "either")


AREA = Area(needs=("data", "models"), named=NAMED, mutated=mutated, share=0.05)
