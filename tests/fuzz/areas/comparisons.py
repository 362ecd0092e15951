"""Rows that compare responses, in every shape, with cells that say nothing, too much or something else."""

import json
import random
from pathlib import Path
from typing import Any

from stages.lib.settings.declaration import Settings, block
from stages.lib.settings.reading import (
    OrderedComparison,
    ScoredComparison,
    Threshold,
    TreeComparison,
    WinnerComparison,
)
from stages.lib.settings.sources import FileSource
from tests.fuzz.areas.raw_rows import TOPICS, assistant, user
from tests.fuzz.areas.rows import as_csv, as_json_lines
from tests.fuzz.case import Area, Case, Complaint, Expected, Whole, no_complaint, put
from tests.fuzz.mutations import Raw, mutated_tree

Row = dict[str, Any]
ROWS = "data/sources/mine/rows.jsonl"
READ = ("read_source@mine",)
GOOD, BAD = "It is good {}.", "No {}."
WINNER = {"responses": ["a", "b"], "winner": ["better"], "tie": ["tie"]}
VOTES = {"responses": ["a", "b"], "winner": ["one", "two"]}
NAMED = WINNER | {"names": ["model_a", "model_b"], "first": [], "second": []}
FLAT = {"root": None, "id_key": "id", "parent_key": "parent"}
# A comparison, and what it says beside the defaults of its type.
SHAPES: dict[str, tuple[type[Settings], dict[str, Any]]] = {
    "winner": (WinnerComparison, WINNER),
    "votes": (WinnerComparison, VOTES),
    "names": (WinnerComparison, NAMED),
    "scores": (ScoredComparison, {"margin": "gap"}),
    "columns of scores": (ScoredComparison, {"responses": ["a", "b"], "scores": ["score_a", "score_b"]}),
    "objects": (ScoredComparison, {"scores": [], "score_key": "score", "text_key": "text"}),
    "order": (OrderedComparison, {}),
    "tree": (TreeComparison, {}),
    "flat": (TreeComparison, FLAT),
}


def node(text: str, role: str, rank: Any = None, *replies: Row, **more: Any) -> Row:
    return {"text": text, "role": role, "rank": rank, "replies": [*replies], **more}


def flat(identity: Any, parent: Any, role: str, text: str, rank: Any = None) -> Row:
    return {"id": identity, "parent": parent, "role": role, "text": text, "rank": rank}


def sound_rows(shape: str, topic: str) -> list[Row]:
    """The rows that say that the first response is the better one."""
    question, good, bad = f"What is {topic}?", GOOD.format(topic), BAD.format(topic)
    two = {"prompt": question, "a": good, "b": bad}
    tree = node(question, "prompter", None, node(good, "assistant", 0), node(bad, "assistant", 1))
    row: Row = {
        "winner": two | {"better": 0},
        "votes": two | {"one": 0, "two": [0, 1]},
        "names": two | {"model_a": "left one", "model_b": "right one", "better": "left one"},
        "scores": {"prompt": question, "responses": [bad, good], "scores": [1.5, 2.5]},
        "columns of scores": two | {"score_a": 5, "score_b": "3.5"},
        "objects": {"prompt": question, "responses": [{"text": good, "score": 2}, {"text": bad, "score": 1}]},
        "order": {"prompt": question, "responses": [good, bad]},
        "tree": {"prompt": tree},
        "flat": {},
    }[shape]
    if shape != "flat":
        return [row]
    asked = flat(topic, None, "prompter", question)
    replies = [flat(f"{topic} {rank}", topic, "assistant", text, rank) for rank, text in enumerate((good, bad))]
    return [*replies, asked]


def sound(shape: str) -> list[Row]:
    return [row for topic in TOPICS for row in sound_rows(shape, topic)]


def changed(shape: str, **values: Any) -> list[Row]:
    """One more row of a shape, of clay."""
    (row,) = sound_rows(shape, "clay")
    return [{key: value for key, value in (row | values).items() if value is not LEFT_OUT}]


LEFT_OUT = object()


def settings_for(shape: str, path: str, **more: Any) -> dict[str, Any]:
    kind, said = SHAPES[shape]
    comparison = block(kind) | said | more.pop("comparison", {})
    source = block(FileSource) | {"path": path, "kinds": ["preference"], "comparison": comparison} | more
    return {"sources": Whole(files={"mine": source}, hub={}, tasks={}, arithmetic={})}


def only(*allowed: tuple[str, str]) -> Complaint:
    """Each pair has the good reply as the chosen one, and of clay there are these pairs and no others."""

    def complaint(folder: Path, accepted: bool) -> str | None:
        if not accepted:
            return None
        rows = [json.loads(line) for line in (folder / ROWS).read_text(encoding="utf-8").split("\n")[:-1]]
        pairs = [tuple(row[side][0]["content"] for side in ("chosen", "rejected")) for row in rows]
        expected = {(GOOD.format(topic), BAD.format(topic)) for topic in TOPICS}
        wrong = [pair for pair in pairs if pair not in expected and pair not in allowed]
        missing = [pair for pair in (*expected, *allowed) if pair not in pairs]
        return (
            f"pairs {wrong or 'none'} are too many, and {missing or 'none'} are missing" if wrong or missing else None
        )

    return complaint


def case(what: str, shape: str, rows: list[Any], expected: Expected, complaint: Complaint, **more: Any) -> Case:
    """Sound rows of a shape, and others after them."""
    path = f"data/raw/{more.pop('file', 'rows.jsonl')}"
    writer = as_csv if path.endswith(".csv") else as_json_lines
    content = more.pop("content", None) or writer([*sound(shape), *rows])
    settings = settings_for(shape, path, **more)
    return Case(
        f"{shape}: {what}", lambda folder: put(folder / path, content), READ, expected, settings, complaint=complaint
    )


CLAY = (GOOD.format("clay"), BAD.format("clay"))
FIRST, SECOND, NEITHER = only(CLAY), only(CLAY[::-1]), only()
# What one cell holds, what must come of it, which pairs there must be then.
CELLS: tuple[tuple[Any, Expected, Complaint], ...] = (
    *((value, "accepted", FIRST) for value in (0, "0", 0.0, "0.0", " 0 ", [0], [0, 0, 1], "[0, 0, 1]")),
    *((value, "accepted", SECOND) for value in (1, "1", 1.0, "1.0", [1], ["1", 0, 1.0], "['1']")),
    *((value, "accepted", NEITHER) for value in ("tie", ["tie"], [0, 1], None, "", " ", [], [None])),
    *((value, "refused", NEITHER) for value in (2, -1, 0.5, "a", "A", "first", "TIE", True, False, "true", {"a": 1})),
    *(
        (value, "refused", NEITHER)
        for value in (float("nan"), float("inf"), "nan", 10**400, [[0]], [{}], "[0", "[0 1]")
    ),
    *((value, "refused", NEITHER) for value in ("\ud800", "0\nerror: b", "[__import__('os').system('touch pwned')]")),
    *((Raw(text), "refused", NEITHER) for text in ("9" * 5000, "[" * 3000 + "]" * 3000)),
    (LEFT_OUT, "refused", NEITHER),
)
CELL_CASES = tuple(
    case(f"{column} is {str(value)[:40]!r}", shape, changed(shape, **{column: value}), expected, complaint)
    for shape, column in (("winner", "better"),)
    for value, expected, complaint in CELLS
)
TEXT = GOOD.format("clay")
RESPONSES: tuple[tuple[Any, Expected, Complaint], ...] = (
    *((value, "accepted", NEITHER) for value in (None, "", " ", BAD.format("clay"))),
    *((value, "refused", NEITHER) for value in (5, True, {"text": "x"}, ["x"], [5], [{"role": "user"}], 10**400)),
    ([assistant(TEXT)], "accepted", FIRST),
    (f"[{{'role': 'assistant', 'content': '{TEXT}'}}]", "either", no_complaint),
    ([user("Q?"), assistant(TEXT)], "either", no_complaint),
    ("\ud800", "accepted", NEITHER),
    (LEFT_OUT, "refused", NEITHER),
)
RESPONSE_CASES = tuple(
    case(f"a is {str(value)[:40]!r}", "winner", changed("winner", a=value), expected, complaint)
    for value, expected, complaint in RESPONSES
)
NAME_CASES = (
    *(
        case(f"the winner is {value!r}", "names", changed("names", better=value), expected, complaint)
        for value, expected, complaint in (
            ("left one", "accepted", FIRST),
            ("right one", "accepted", SECOND),
            ("tie", "accepted", NEITHER),
            (["left one", "right one", "right one"], "accepted", SECOND),
            ("model_a", "refused", NEITHER),
            ("Left One", "refused", NEITHER),
            (0, "refused", NEITHER),
        )
    ),
    *(
        case(f"model_b is {value!r}", "names", changed("names", model_b=value), expected, complaint)
        for value, expected, complaint in (
            ("left one", "accepted", NEITHER),
            (None, "accepted", NEITHER),
            ("tie", "either", no_complaint),
            (LEFT_OUT, "either", NEITHER),
            (["left one"], "either", no_complaint),
        )
    ),
)
SCORES: tuple[tuple[Any, Expected, Complaint], ...] = (
    *((value, "accepted", FIRST) for value in ([1, 2], ["1", "2"], [-1, 0], "[1, 2]", [1e-300, 1], [-1e30, 1e30])),
    *((value, "accepted", SECOND) for value in ([2, 1], ["10", "9"], [2.5, 1])),
    *((value, "accepted", NEITHER) for value in ([1, 1], [None, 1], ["", 1], [1, 1.0])),
    *((value, "refused", NEITHER) for value in ([1], [1, 2, 3], [], 5, "x", None, {"a": 1}, [True, False])),
    *((value, "refused", NEITHER) for value in ([float("nan"), 1], ["nan", 1], [float("inf"), 1], [10**400, 1])),
    *((value, "refused", NEITHER) for value in (["1,5", 1], ["5 stars", 1], [[1], 2], [{}, {}], "[1, open('x')]")),
    *((value, "refused", NEITHER) for value in ([-1e308, 1e308], [0, 1e39])),  # no float32 holds the margin
    (LEFT_OUT, "refused", NEITHER),
)
SCORE_CASES = (
    *(
        case(f"scores are {str(value)[:40]!r}", "scores", changed("scores", scores=value), expected, complaint)
        for value, expected, complaint in SCORES
    ),
    *(
        case(f"responses are {str(value)[:40]!r}", "scores", changed("scores", responses=value), "refused", NEITHER)
        for value in (5, None, "x", "[", [], [1, 2], {"a": [1], "b": 2}, [{"text": "x"}, {"text": "y"}], [[], []])
    ),
    *(
        case(f"responses are {str(value)[:40]!r}", "objects", changed("objects", responses=value), "refused", NEITHER)
        for value in (["x", "y"], [{"score": 1}, {"score": 2}], [{"text": 5, "score": 1}, {"text": "y", "score": 2}])
    ),
    *(
        case(
            f"a response more: {str(value)[:40]!r}", "objects", changed("objects", responses=value), "accepted", NEITHER
        )
        for value in ([{"text": "x"}, {"text": "y", "score": 2}], {"text": ["x", "x"], "score": [1, 2]})
    ),
    case("100 responses of equal score", "order", changed("order", responses=["x"] * 100), "accepted", NEITHER),
    case("one response", "order", changed("order", responses=["x"]), "accepted", NEITHER),
    case(
        "1,000 responses",
        "order",
        changed("order", responses=[f"r {n}" for n in range(1000)]),
        "accepted",
        no_complaint,
    ),
    case("no prompt", "order", changed("order", prompt=LEFT_OUT), "refused", NEITHER),
    case("a prompt of messages", "order", changed("order", prompt=[user("Q?")]), "accepted", FIRST),
    case(
        "a prompt that ends with the assistant", "order", changed("order", prompt=[assistant("Q")]), "either", NEITHER
    ),
)


SETTINGS = (
    case(
        "ties kept",
        "winner",
        changed("winner", better="tie"),
        "accepted",
        only(CLAY, CLAY[::-1]),
        comparison={"ties": "keep"},
    ),
    case("a least gap of 2", "scores", [], "refused", NEITHER, comparison={"least_gap": 2.0}),
    case("best last", "order", [], "accepted", no_complaint, comparison={"best": "last"}),
    case("an input template", "winner", [], "accepted", NEITHER, input_template="Say: {}"),
    *(
        case(f"input_template {template!r}", "winner", [], "refused", NEITHER, input_template=template)
        for template in (
            "",
            "x",
            "{} {}",
            "{0}",
            "{x}",
            "{",
            "{!r}",
            "{:>99999999999}",
            "{}\\n",
            "{}\0",
            "{.__class__}",
        )
    ),
    *(
        case(f"comparison {said}", shape, [], "refused", NEITHER, comparison=said)
        for shape, said in (
            ("winner", {"responses": ["a"]}),
            ("winner", {"responses": []}),
            ("winner", {"responses": ["a", "a"]}),
            ("winner", {"responses": ["a", "b", "better"]}),
            ("winner", {"winner": []}),
            ("winner", {"winner": ["best"]}),
            ("winner", {"winner": ["better", "better"]}),
            ("winner", {"first": [], "second": []}),
            ("winner", {"first": [0], "second": ["0"]}),
            ("winner", {"first": [1], "second": [True, "1.0"]}),
            ("winner", {"tie": [0]}),
            ("winner", {"names": ["a", "b"]}),
            ("winner", {"first": [0.5]}),
            ("winner", {"first": [None]}),
            ("winner", {"first": [2**64]}),
            ("winner", {"least_gap": float("nan")}),
            ("winner", {"least_gap": -1.0}),
            ("winner", {"text_key": "text"}),
            ("scores", {"scores": []}),
            ("scores", {"score_key": "score"}),
            ("scores", {"scores": ["a", "b"]}),
            ("objects", {"text_key": None}),
            ("tree", {"id_key": "id"}),
            ("flat", {"root": "prompt"}),
            ("flat", {"id_key": "name"}),
            ("tree", {"root": "text"}),
        )
    ),
    case("format: alpaca beside it", "winner", [], "refused", NEITHER, format="alpaca"),
    case("a threshold beside it", "winner", [], "refused", NEITHER, threshold=block(Threshold), kinds=["unpaired"]),
    case("kinds of unpaired", "winner", [], "refused", NEITHER, kinds=["unpaired"]),
    case("messages of any shape in its place", "winner", [], "refused", NEITHER, content=b'{"messages": []}\n'),
    *(
        case("in a CSV file", shape, [], "accepted", NEITHER, file="rows.csv")
        for shape in SHAPES
        if shape not in ("tree", "flat")
    ),
)


def labels(what: str, rows: list[Row], expected: Expected, **threshold: Any) -> Case:
    """Prompt, completion and a score, which becomes the label of unpaired data."""
    sound = [{"prompt": f"What is {topic}?", "completion": "A.", "score": 1 + 4 * (topic < "m")} for topic in TOPICS]
    source = block(FileSource) | {"path": "data/raw/rows.jsonl", "kinds": ["unpaired"]}
    source["threshold"] = block(Threshold) | threshold
    settings = {"sources": Whole(files={"mine": source}, hub={}, tasks={}, arithmetic={})}
    content = as_json_lines([*sound, *rows])
    return Case(
        f"threshold: {what}", lambda folder: put(folder / "data/raw/rows.jsonl", content), READ, expected, settings
    )


def scored(value: Any) -> list[Row]:
    row = {"prompt": "What is clay?", "completion": "A.", "score": value}
    return [row] if value is not LEFT_OUT else [{"prompt": "Q?", "completion": "A."}]


THRESHOLDS = (
    *(
        labels(f"a score of {str(value)[:30]!r}", scored(value), expected)
        for value, expected in (
            *((value, "accepted") for value in (4, 3.999, "4", "3.5", None, "", -1e308, 10**300)),
            *((value, "refused") for value in (True, "good", [4], {}, float("nan"), "inf", 10**400, LEFT_OUT)),
        )
    ),
    labels("good and bad overlap", [], "refused", good_from=1.0, bad_below=2.0),
    labels("nothing is good or bad", [], "refused", good_from=9.0, bad_below=0.0),
    labels("a column that is not there", [], "refused", score="rating"),
    labels("no column", [], "refused", score=None),
    labels("a column that is text", [], "refused", score="prompt"),
    labels("NaN", [], "refused", good_from=float("nan")),
)


def mutated(draw: random.Random) -> Case:
    """Sound rows of one shape, of which one was changed in one place."""
    shape = draw.choice([*SHAPES])
    rows = sound(shape)
    number = draw.randrange(len(rows))
    what, rows[number] = mutated_tree(rows[number], draw)
    more: dict[str, Any] = {"on_unusable_row": "drop"} if draw.random() < 0.3 else {}
    return case(f"row {number + 1}: {what}", shape, [], "either", no_complaint, content=as_json_lines(rows), **more)


NOTHING_WRONG = tuple(case("nothing wrong", shape, [], "accepted", NEITHER) for shape in SHAPES)
AREA = Area(
    needs=(),
    named=(
        *(*NOTHING_WRONG, *CELL_CASES, *RESPONSE_CASES, *NAME_CASES, *SCORE_CASES),
        *(*SETTINGS, *THRESHOLDS),
    ),
    mutated=mutated,
    share=0.05,
)
