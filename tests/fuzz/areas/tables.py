"""Token tables: their rows, columns, types and bytes."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow

from stages.lib.data.token_tables import PREFERENCE_SCHEMA, PROMPT_SCHEMA, SFT_SCHEMA
from tests.fuzz.case import Area, Case, Expected, put
from tests.fuzz.mutations import mutated_bytes

Columns = dict[str, list[Any]]
SCHEMAS = {"sft": SFT_SCHEMA, "preference": PREFERENCE_SCHEMA, "prompts": PROMPT_SCHEMA}
STAGES = {
    "sft": ("train_sft@sft", "evaluate@sft"),
    "preference": ("train_rm@rm", "ref_logprobs@sft", "train_dpo@dpo", "evaluate@dpo", "evaluate_rm@rm"),
    "prompts": ("train_ppo@ppo", "train_grpo@grpo", "evaluate@ppo"),
}
PROMPTS_ALONE = ("train_ppo@ppo", "train_grpo@grpo")


def splits_of(stage: str) -> tuple[str, ...]:
    """The splits that a stage reads."""
    if stage.startswith("evaluate"):
        return ("test",)
    return ("train",) if stage in PROMPTS_ALONE else ("train", "validation")


def read(path: Path) -> pyarrow.Table:
    with pyarrow.memory_map(str(path)) as source:
        return pyarrow.ipc.open_stream(source).read_all()


def write(path: Path, table: pyarrow.Table) -> None:
    made = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(made, table.schema) as stream:
        stream.write_table(table, max_chunksize=1000)
    put(path, made.getvalue().to_pybytes())


def rewritten(path: Path, change: Callable[[Columns], None], schema: pyarrow.Schema | None = None) -> None:
    """Change the values of a table, and keep what its writer noted in the schema."""
    table = read(path)
    columns = table.to_pydict()
    change(columns)
    if schema is None:
        schema = table.schema
    write(path, pyarrow.table(columns, schema=schema))


def case(what: str, stage: str, kind: str, split: str, change: Callable[[Columns], None], expected: Expected) -> Case:
    def prepare(folder: Path) -> None:
        rewritten(folder / f"data/tokens/{split}/{kind}.arrow", change)

    return Case(f"{stage}, {kind} {split}: {what}", prepare, (stage,), expected)


def setting(column: str, row: int, value: Any) -> Callable[[Columns], None]:
    def change(columns: Columns) -> None:
        columns[column][row] = value

    return change


def changing(column: str, row: int, make: Callable[[Any], Any]) -> Callable[[Columns], None]:
    def change(columns: Columns) -> None:
        columns[column][row] = make(columns[column][row])

    return change


def everywhere(column: str, make: Callable[[Any], Any]) -> Callable[[Columns], None]:
    def change(columns: Columns) -> None:
        columns[column] = [make(value) for value in columns[column]]

    return change


def read_by(kind: str) -> list[tuple[str, str]]:
    return [(stage, split) for stage in STAGES[kind] for split in splits_of(stage)]


IDS = {"sft": ("input_ids",), "preference": ("prompt_ids", "chosen_ids", "rejected_ids"), "prompts": ("prompt_ids",)}
ID_FAULTS: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("null", lambda _: None),
    ("empty", lambda _: []),
    ("one null id", lambda ids: [None, *ids[1:]]),
    ("an id of -1", lambda ids: [-1, *ids[1:]]),
    ("an id beyond the vocabulary", lambda ids: [*ids[:-1], 400]),
    ("the largest id there is", lambda ids: [2**31 - 1, *ids[1:]]),
    ("more ids than positions", lambda ids: ids * 60),
)
MASK_FAULTS: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("null", lambda _: None),
    ("empty", lambda _: []),
    ("shorter than the ids", lambda mask: mask[:-1]),
    ("longer than the ids", lambda mask: [*mask, True]),
    ("a null in it", lambda mask: [*mask[:-1], None]),
    ("all false", lambda mask: [False] * len(mask)),
    ("all true", lambda mask: [True] * len(mask)),
)
MARGIN_FAULTS: tuple[tuple[str, Any], ...] = (
    ("NaN", float("nan")),
    ("inf", float("inf")),
    ("-1", -1.0),
    ("1e38", 1e38),
)
ID_CASES = tuple(
    case(f"{column} of row {row}: {what}", stage, kind, split, changing(column, row, make), "refused")
    for kind, columns in IDS.items()
    for stage, split in read_by(kind)
    for column in columns
    for what, make in ID_FAULTS
    for row in (2,)
)
MASK_CASES = tuple(
    case(f"loss_mask: {what}", stage, "sft", split, changing("loss_mask", 2, make), expected)
    for stage, split in read_by("sft")
    for what, make in MASK_FAULTS
    for expected in (("either" if what == "all true" else "refused"),)
)
MARGIN_CASES = tuple(
    case(f"margin: {what}", "train_rm@rm", "preference", split, setting("margin", 1, value), "either")._replace(
        settings={"train_rm": {"rm": {"loss": {"use_margin": use}}}}
    )
    for what, value in MARGIN_FAULTS
    for split in ("train", "validation")
    for use in (True, False)
)


MESSAGES = '[{"role": "user", "content": "why?"}]'
TEXT_FAULTS: tuple[tuple[str, str | None], ...] = (
    ("null", None),
    ("empty", ""),
    ("no JSON", "{'a': 1}"),
    ("a number", "3"),
    ("JSON's null", "null"),
    ("half a surrogate pair", MESSAGES.replace("why", "\\ud800")),
    ("a role that there is not", MESSAGES.replace("user", "critic")),
    ("a key twice", '{"task": "film_reviews", "task": "film_reviews"}'),
    ("a number beyond float64", '{"answer": 1e999}'),
    ("100,000 nested brackets", "[" * 100_000),
    ("a task with a newline in its name", '{"task": "film\\nerror: reviews"}'),
    ("a task that is a list", '{"task": [["film_reviews"]]}'),
    ("a task without its facts", '{"task": "film_reviews", "film": 3}'),
)
# Facts name a task only to whoever grades, and messages are no facts.
OF_GRADING = ("a task with", "a task that")
TEXT_CASES = tuple(
    case(
        f"{column} of row 2: {what}",
        stage,
        "prompts",
        split,
        setting(column, 2, text),
        "accepted" if column == "facts" and what.startswith(OF_GRADING) and stage.startswith("train") else "refused",
    )
    for stage, split in read_by("prompts")
    for column in ("messages", "facts")
    for what, text in TEXT_FAULTS
)
FACTS: tuple[tuple[str, Any, Expected], ...] = (
    ("a list", ["film_reviews"], "refused"),
    ("null", None, "refused"),
    ("half a surrogate pair", {"answer": "\ud800"}, "refused"),
    ("an unknown task", {"task": "film_reveiws"}, "refused"),
    ("a task without its facts", {"task": "film_reviews"}, "refused"),
    ("a film of one letter", {"task": "film_reviews", "film": "a", "genre": "war", "aspect": "plot"}, "accepted"),
    ("none of a task", {"answer": [1.5, "é"], "\u2028": {"\n": True}}, "accepted"),
    ("nothing", {}, "accepted"),
)


def prepared_facts(what: str, facts: Any, expected: Expected) -> Case:
    """In a prepared row, from which they go into the table and to whoever grades."""

    def prepare(folder: Path) -> None:
        path = folder / "data/prepared/test/prompts.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows[2]["facts"] = facts
        put(path, "".join(json.dumps(row) + "\n" for row in rows))

    return Case(f"facts of a prepared prompt: {what}", prepare, ("tokenize_data@prompts", "evaluate@ppo"), expected)


FACTS_CASES = tuple(prepared_facts(*given) for given in FACTS)


def all_false(columns: Columns) -> None:
    columns["loss_mask"] = [[False] * len(mask) for mask in columns["loss_mask"]]


def identical_pairs(columns: Columns) -> None:
    columns["rejected_ids"] = list(columns["chosen_ids"])


ROWS: tuple[tuple[str, Callable[[Columns], None], Expected], ...] = (
    ("rows that count backwards", lambda columns: columns["row"].reverse(), "either"),
    ("a null row number", setting("row", 1, None), "refused"),
    ("a negative row number", setting("row", 0, -5), "refused"),
    ("a row number twice", setting("row", 1, 0), "refused"),
)
ROW_CASES = tuple(
    case(what, stage, kind, splits_of(stage)[0], change, expected)
    for kind in STAGES
    for stage in STAGES[kind]
    for what, change, expected in ROWS
)


def schema_case(what: str, kind: str, change: Callable[[pyarrow.Table], pyarrow.Table], expected: Expected) -> Case:
    stage = STAGES[kind][0]

    def prepare(folder: Path) -> None:
        path = folder / f"data/tokens/train/{kind}.arrow"
        write(path, change(read(path)))

    return Case(f"{stage}, {kind} train: {what}", prepare, (stage,), expected)


def wider_ids(table: pyarrow.Table) -> pyarrow.Table:
    return table.set_column(1, table.schema.names[1], table[1].cast(pyarrow.list_(pyarrow.int64())))


def renamed_column(table: pyarrow.Table) -> pyarrow.Table:
    return table.rename_columns([*table.schema.names[:-1], "x\nerror: y"])


def column_twice(table: pyarrow.Table) -> pyarrow.Table:
    return table.append_column(table.schema.names[1], table[1])


NOTES = {b"precision": b"\xff\xfe", b"\xff": b"x", b"huggingface": b"{}"}
SCHEMA_CASES = tuple(
    schema_case(what, kind, change, expected)
    for kind in STAGES
    for what, change, expected in (
        ("ids of 64 bits", wider_ids, "refused"),
        ("a column with a newline in its name", renamed_column, "refused"),
        ("a column twice", column_twice, "refused"),
        ("no rows", lambda table: table.slice(0, 0), "refused"),
        ("one row", lambda table: table.slice(0, 1), "either"),
        ("a column missing", lambda table: table.drop_columns([table.schema.names[-1]]), "refused"),
        ("notes that are not UTF-8", lambda table: table.replace_schema_metadata(NOTES), "either"),
        (
            "huggingface's notes that are no JSON",
            lambda table: table.replace_schema_metadata({b"huggingface": b"{"}),
            "either",
        ),
        ("huggingface's notes of other columns", lambda table: table.replace_schema_metadata(FEATURES), "either"),
    )
)
FEATURES = {b"huggingface": b'{"info": {"features": {"x": {"dtype": "int32", "_type": "Value"}}}}'}


def file_case(what: str, kind: str, act: Callable[[Path], object]) -> Case:
    stage = STAGES[kind][0]
    return Case(
        f"{stage}: the {kind} table is {what}",
        lambda folder: act(folder / f"data/tokens/train/{kind}.arrow"),
        (stage,),
        "refused",
    )


def with_kinds(stage: str, kinds: list[str], expected: Expected, *missing: str) -> Case:
    """Rows of some kinds alone are prepared; of the others there are no tables."""

    def prepare(folder: Path) -> None:
        for kind in ({*SCHEMAS} - {*kinds}) | {*missing}:
            for split in ("train", "validation", "test"):
                (folder / f"data/tokens/{split}/{kind}.arrow").unlink()

    lacks = f" without the table of {missing[0]}" if missing else ""
    return Case(f"{stage} with kinds {kinds}{lacks}", prepare, (stage,), expected, {"prepare_data": {"kinds": kinds}})


KINDS_CASES = (
    *(
        with_kinds(stage, kinds, "accepted")
        for stage in ("evaluate@sft", "evaluate@dpo")
        for kinds in (["sft"], ["prompts"], ["preference"], ["sft", "prompts"], ["preference", "prompts"])
    ),
    *(with_kinds(stage, [*SCHEMAS], "refused", kind) for stage in ("evaluate@dpo",) for kind in SCHEMAS),
    *(with_kinds("evaluate@dpo", kinds, "either") for kinds in (["unpaired"], ["unpaired", "prompts"])),
    with_kinds("evaluate@sft", [], "refused"),
)
FILE_CASES = tuple(
    file_case(what, kind, act)
    for kind in STAGES
    for what, act in (
        ("missing", lambda path: path.unlink()),
        ("empty", lambda path: put(path, b"")),
        ("a folder", lambda path: (path.unlink(), path.mkdir())),
        ("JSON", lambda path: put(path, "{}")),
        ("a dangling link", lambda path: (path.unlink(), path.symlink_to("nowhere"))),
    )
)
FROM_OTHERS = (
    Case(
        "train_dpo@dpo: the tokens were exchanged for others of as many rows",
        lambda folder: rewritten(
            folder / "data/tokens/train/preference.arrow", lambda columns: columns["chosen_ids"].reverse()
        ),
        ("train_dpo@dpo",),
        "refused",
    ),
    case("every reply is null to the loss", "train_sft@sft", "sft", "train", all_false, "refused"),
    case("both replies are the same", "train_dpo@dpo", "preference", "train", identical_pairs, "either"),
    case("both replies are the same", "train_rm@rm", "preference", "train", identical_pairs, "either"),
)


def mutated(draw: random.Random) -> Case:
    """A table whose bytes were damaged, or several rows of which were."""
    kind = draw.choice(list(STAGES))
    stage, split = draw.choice(read_by(kind))
    path = f"data/tokens/{split}/{kind}.arrow"
    if draw.random() < 0.5:
        place = draw.random()

        def damage(folder: Path) -> None:
            _, content = mutated_bytes((folder / path).read_bytes(), random.Random(place))
            put(folder / path, content)

        return Case(f"{stage}, {kind} {split}: damaged file ({place})", damage, (stage,))
    column = draw.choice(IDS[kind])
    (first, make), (second, also) = draw.choice(ID_FAULTS), draw.choice(ID_FAULTS)
    rows: Sequence[int] = [draw.randrange(8), draw.randrange(8)]

    def change(columns: Columns) -> None:
        for row, how in zip(rows, (make, also), strict=True):
            if columns[column][row]:
                columns[column][row] = how(columns[column][row])

    return case(f"{column} of rows {rows}: {first}, {second}", stage, kind, split, change, "refused")


AREA = Area(
    needs=("data/prepared", "data/tokens", "data/ref_logprobs", "models"),
    named=(
        *FROM_OTHERS,
        *MASK_CASES,
        *MARGIN_CASES,
        *FACTS_CASES,
        *ROW_CASES,
        *SCHEMA_CASES,
        *KINDS_CASES,
        *FILE_CASES,
    ),
    systematic=(*ID_CASES, *TEXT_CASES),
    mutated=mutated,
    share=0.07,
)
