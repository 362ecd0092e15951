"""What the report and the comparison of curves are made from."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.lib.settings.declaration import block
from stages.lib.settings.train_dpo import TrainDpo
from tests.fuzz.case import Area, Case, Expected, Whole, nothing, put
from tests.fuzz.mutations import ODD_VALUES, Raw, json_text, mutated_bytes, mutated_tree
from tests.pipeline.graph import all_instances, load_graph, outs_of, training_stages

METRICS = tuple(
    out.removeprefix("metrics/").removesuffix(".json")
    for stage in all_instances(load_graph()).values()
    for out in outs_of(stage)
    if out.startswith("metrics/") and out.endswith(".json") and "read_source" not in out
)
POLICIES = ("sft", "dpo", "ppo", "grpo")
CURVES = tuple(stage.partition("@")[2] for stage in training_stages())
STAGE = ("report",)


def metrics_case(
    what: str, name: str, change: Callable[[dict[str, Any]], object], expected: Expected = "either"
) -> Case:
    def prepare(folder: Path) -> None:
        path = folder / f"metrics/{name}.json"
        values = json.loads(path.read_text())
        change(values)
        put(path, json_text(values))

    return Case(f"metrics/{name}.json: {what}", prepare, STAGE, expected)


def text_case(what: str, path: str, text: str | bytes, expected: Expected = "refused") -> Case:
    return Case(f"{path}: {what}", lambda folder: put(folder / path, text), STAGE, expected)


def sample_case(what: str, change: Callable[[dict[str, Any]], object], expected: Expected = "refused") -> Case:
    """The first sample of every policy changed in the same way, so that they are of the same prompts."""

    def prepare(folder: Path) -> None:
        for path in sorted((folder / "data/samples").glob("*.jsonl")):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            change(rows[0])
            put(path, "".join(json_text(row) + "\n" for row in rows))

    return Case(f"samples: {what}", prepare, STAGE, expected)


def put_in(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.__setitem__(key, value)


KEYS = (
    ("evaluate/dpo", "reward_mean"),
    ("prepare_data", "sft/train_rows"),
    ("training/rm", "validation_accuracy"),
    ("training/sft", "new_one"),
)
VALUES = (
    float("nan"),
    float("inf"),
    10**401,
    -(10**401),
    1e308,
    -1e308,
    2**63,
    2**64,
    None,
    "x",
    True,
    [],
    {},
    Raw("9" * 5000),
)
VALUES += (Raw("[" * 100_000 + "]" * 100_000), Raw("1e400"), -5, 1e-320)
METRICS_CASES = (
    *(metrics_case(f"{key} is {str(value)[:40]}", name, put_in(key, value)) for name, key in KEYS for value in VALUES),
    *(
        metrics_case(f"a key {key[:30]!r}", "training/sft", put_in(key, 1.5))
        for key in ("", "<script>", "a\nb", "\ud800", "x" * 9999)
    ),
    *(metrics_case("a key that is missing", name, lambda values: values.pop(sorted(values)[0])) for name in METRICS),
    *(
        text_case(what, f"metrics/{name}.json", text)
        for name in ("prepare_data", "evaluate/sft", "training/rm", "score_samples/dpo")
        for what, text in (
            *(("a list", "[]"), ("null", "null"), ("nothing", ""), ("no JSON", "{"), ("nested deeply", "[" * 100_000)),
            *(
                ("mappings nested deeply", '{"a":' * 50_000),
                ("not UTF-8", b'{"a": "\xff"}'),
                ("UTF-16", "{}".encode("utf-16")),
            ),
            *(("a byte order mark", b"\xef\xbb\xbf{}"), ("a key twice", '{"rows": 1, "rows": 2}')),
        )
    ),
)
HEAD = "step,loss,accuracy\n"
CURVE_TEXTS: tuple[tuple[str, str | bytes, Expected], ...] = (
    ("only a header", HEAD, "either"),
    ("nothing", "", "refused"),
    ("white space", " \n", "refused"),
    ("integers beyond int64", f"{HEAD}1,{2**64},1\n2,{-(2**64)},0\n", "either"),
    ("integers of 400 digits", f"{HEAD}1,{'9' * 400},1\n", "either"),
    ("integers of 5,000 digits", f"{HEAD}1,{'9' * 5000},1\n", "either"),
    ("1e308", f"{HEAD}1,1e308,1\n2,-1e308,0\n3,1e308,1\n", "either"),
    ("1e400", f"{HEAD}1,1e400,1\n", "either"),
    ("the smallest number", f"{HEAD}1,5e-324,1\n2,0,0\n", "either"),
    ("a column named url(#x", "step,url(#x\n1,2\n2,3\n", "either"),
    ("a column of markup", 'step,</svg><script>alert(1)</script>,"a"" onload=""x"\n1,2,3\n2,3,4\n', "either"),
    ("a column of mathematics", "step,$x^{\n1,2\n2,3\n", "either"),
    ("a column without a name", "step,,\n1,2,3\n", "either"),
    ("a column name of NUL", "step,\0\n1,2\n", "either"),
    ("a column of 10,000 letters", f"step,{'x' * 10_000}\n1,2\n2,3\n", "either"),
    ("a column name of two lines", 'step,"a\nerror: b"\n1,2\n2,3\n', "either"),
    ("a column twice", "step,loss,loss\n1,2,3\n2,3,4\n", "refused"),
    ("no step", "loss\n1\n", "refused"),
    ("a step twice", f"{HEAD}1,2,3\n1,2,3\n", "refused"),
    ("a step that is empty", f"{HEAD},2,3\n", "refused"),
    ("a step that is text", f"{HEAD}one,2,3\n", "refused"),
    ("a step that is infinite", f"{HEAD}inf,2,3\n", "refused"),
    ("a step beyond int64", f"{HEAD}{2**70},2,3\n", "either"),
    ("negative steps", f"{HEAD}-1,2,3\n-2,2,3\n", "either"),
    ("a cell that is text", f"{HEAD}1,high,3\n", "refused"),
    ("a cell that is true", f"{HEAD}1,True,3\n", "refused"),
    ("a cell that is infinite", f"{HEAD}1,inf,3\n2,1,1\n", "either"),
    ("a cell that is a complex number", f"{HEAD}1,1+2j,3\n", "refused"),
    ("cells that are empty", f"{HEAD}1,,\n2,,\n", "either"),
    ("more cells than columns", f"{HEAD}1,2,3,4,5\n", "refused"),
    ("fewer cells than columns", f"{HEAD}1\n", "either"),
    ("an open quote", f'{HEAD}1,"2,3\n', "refused"),
    ("NUL", f"{HEAD}1,\0,3\n", "either"),
    ("not UTF-8", HEAD.encode() + b"1,\xff,3\n", "refused"),
    ("UTF-16", HEAD.encode("utf-16"), "refused"),
    ("a byte order mark", b"\xef\xbb\xbf" + HEAD.encode() + b"1,2,3\n2,1,1\n", "either"),
    ("semicolons", "step;loss\n1;2\n", "refused"),
    ("3,000 columns", "step," + ",".join(f"c{n}" for n in range(3000)) + "\n", "either"),
)


def curve_case(what: str, text: str | bytes, expected: Expected) -> Case:
    """A curve of SFT, whose metrics say the same number of steps."""

    def prepare(folder: Path) -> None:
        put(folder / "metrics/curves/sft.csv", text)
        lines = text.encode().splitlines() if isinstance(text, str) else text.splitlines()
        last = lines[-1].split(b",")[0] if lines else b""
        path = folder / "metrics/training/sft.json"
        values = json.loads(path.read_text()) | {"steps": int(last) if last.isdigit() else 2}
        del values["kept_step"]  # whose loss the curve must have
        put(path, json_text(values))

    return Case(f"metrics/curves/sft.csv: {what}", prepare, STAGE, expected)


CURVE_CASES = tuple(curve_case(*text) for text in CURVE_TEXTS)
SCORES = (float("nan"), float("inf"), 10**400, "5", None, True, -1e308, Raw("9" * 5000))


def score_case(what: str, key: str, value: Any) -> Case:
    """The first score of one policy changed."""

    def prepare(folder: Path) -> None:
        path = folder / "data/sample_scores/dpo.jsonl"
        first, *others = [json.loads(line) for line in path.read_text().splitlines()]
        put(path, "".join(json_text(row) + "\n" for row in (first | {key: value}, *others)))

    return Case(f"data/sample_scores/dpo.jsonl: {what}", prepare, STAGE, "refused")


SAMPLE_CASES = (
    sample_case("nothing wrong", lambda _: None, "accepted"),
    *(
        sample_case(f"prompt is {value!r}"[:60], put_in("prompt", value))
        for value in ([5], None, {}, [{}], [{"role": 5}])
    ),
    *(
        sample_case(f"gold is {value!r}"[:60], put_in("gold", value))
        for value in ("x", [], float("nan"), 10**400, True)
    ),
    *(
        sample_case(f"{key} is {str(value)[:30]}", put_in(key, value))
        for key in ("length", "kl", "reference_gold", "row")
        for value in (float("nan"), float("inf"), 10**400, "5", None, True, -1e308, Raw("9" * 5000))
    ),
    *(sample_case(f"response is {value!r}"[:60], put_in("response", value)) for value in (None, 5, ["a"], {})),
    *(
        sample_case(f"response is {value!r}"[:60], put_in("response", value), "either")
        for value in ("", "<script>alert(1)</script>", "\ud800", "\0", "\x1b[2J", "\u202ex", "{{ 1/0 }}", "x" * 100_000)
    ),
    *(sample_case(f"ended is {value!r}", put_in("ended", value)) for value in (None, 1, "yes")),
    sample_case("no key 'kl'", lambda row: row.pop("kl")),
    *(score_case(f"{key} is {str(value)[:30]}", key, value) for key in ("row", "score") for value in SCORES),
    score_case("reference_score is text", "reference_score", "x"),
    text_case("no scores", "data/sample_scores/dpo.jsonl", ""),
    text_case("scores that are a list", "data/sample_scores/dpo.jsonl", "[]\n"),
    text_case("scores of fewer samples", "data/sample_scores/dpo.jsonl", '{"row": 0, "score": 0.5}\n'),
    text_case("nothing", "data/samples/dpo.jsonl", ""),
    text_case("a list", "data/samples/dpo.jsonl", "[]\n"),
    text_case("no JSON", "data/samples/dpo.jsonl", "{\n"),
    text_case("nested deeply", "data/samples/dpo.jsonl", "[" * 100_000 + "\n"),
    text_case("not UTF-8", "data/samples/dpo.jsonl", b'{"a": "\xff"}\n'),
)


def gone(path: str) -> Case:
    return Case(f"{path} is not there", lambda folder: (folder / path).unlink(), STAGE)


def exchanged_for(path: str, what: str, make: Callable[[Path], object]) -> Case:
    def prepare(folder: Path) -> None:
        (folder / path).unlink()
        make(folder / path)

    return Case(f"{path} is {what}", prepare, STAGE, "refused")


FILES = (
    *(gone(f"metrics/{name}.json") for name in METRICS),
    *(gone(f"metrics/curves/{name}.csv") for name in CURVES),
    *(gone(f"data/{of}/{name}.jsonl") for of in ("samples", "sample_scores") for name in POLICIES),
    Case(
        "policies of which none is evaluated are there",
        nothing,
        STAGE,
        "accepted",
        {"evaluate": {"policies": Whole(sft="models/sft")}, "score_samples": {"policies": ["sft"]}},
    ),
    Case(
        "nothing is evaluated",
        nothing,
        STAGE,
        "accepted",
        {"evaluate": {"policies": Whole()}, "score_samples": {"policies": []}, "evaluate_rm": Whole()},
    ),
    Case(
        "a policy that was not evaluated",
        nothing,
        STAGE,
        "refused",
        {"evaluate": {"policies": {"other": "models/ppo"}}},
    ),
    Case("a model that was not trained", nothing, STAGE, "refused", {"train_dpo": {"other": block(TrainDpo)}}),
    *(
        exchanged_for(path, what, make)
        for path in (
            "metrics/training/sft.json",
            "metrics/curves/sft.csv",
            "data/samples/sft.jsonl",
            "metrics/evaluate/dpo.json",
        )
        for what, make in (
            ("a folder", lambda path: path.mkdir()),
            ("a dangling link", lambda path: path.symlink_to("nowhere")),
        )
    ),
)


def mutated(draw: random.Random) -> Case:
    """One place of one file changed."""
    name = draw.choice(
        [*(f"metrics/{name}.json" for name in METRICS), *(f"metrics/curves/{name}.csv" for name in CURVES)] * 2
        + ["data/samples/dpo.jsonl"] * 6
    )
    place = draw.random()
    if name.startswith("data/samples"):
        what, value = draw.choice(ODD_VALUES)
        key = draw.choice(
            (
                "row",
                "prompt",
                "response",
                "reference_ended",
                "kl",
                "length",
                "ended",
                "reference_response",
                "reference_gold",
                "gold",
            )
        )
        return sample_case(f"{key} is {what[:60]}", put_in(key, value), "either")

    def act(folder: Path) -> None:
        again = random.Random(place)
        content = (folder / name).read_bytes()
        if name.endswith(".json") and again.random() < 0.8:
            put(folder / name, json_text(mutated_tree(json.loads(content), again)[1]))
        else:
            put(folder / name, mutated_bytes(content, again)[1])

    return Case(f"{name} changed in one place ({place})", act, STAGE)


AREA = Area(
    needs=("metrics", "data/samples", "data/sample_scores"),
    named=(*METRICS_CASES, *CURVE_CASES, *SAMPLE_CASES, *FILES),
    mutated=mutated,
    share=0.05,
)
