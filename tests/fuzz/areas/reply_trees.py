"""Trees of replies with ranks: nested in a row, or flat files of messages that name the one they answer."""

import random
from typing import Any

from tests.fuzz.areas.comparisons import CLAY, FIRST, NEITHER, Row, case, flat, node, sound
from tests.fuzz.areas.rows import as_json_lines
from tests.fuzz.case import Area, Case, Complaint, Expected, no_complaint
from tests.fuzz.mutations import Raw, mutated_tree


def tree(what: str, root: Any, expected: Expected, complaint: Complaint = NEITHER) -> Case:
    return case(what, "tree", [{"prompt": root}], expected, complaint)


def deep_tree(depth: int) -> Raw:
    start = '{"text": "q", "role": "prompter", "replies": [{"text": "a", "role": "assistant", "rank": 0, "replies": ['
    return Raw(start * depth + "]}]}" * depth)


QUESTION, REPLY, OTHER = "What is clay?", node(CLAY[0], "assistant", 0), node(CLAY[1], "assistant", 1)
TREES = (
    *(tree(f"is {str(root)[:40]!r}", root, "refused") for root in (5, None, "x", [], [REPLY], {}, {"text": "x"}, True)),
    tree("alone", node(QUESTION, "prompter"), "accepted"),
    tree("one reply", node(QUESTION, "prompter", None, REPLY), "accepted"),
    tree("two replies", node(QUESTION, "prompter", None, OTHER, REPLY), "accepted", FIRST),
    tree(
        "ranks as text",
        node(QUESTION, "prompter", None, REPLY | {"rank": "2"}, OTHER | {"rank": "10"}),
        "accepted",
        FIRST,
    ),
    tree("equal ranks", node(QUESTION, "prompter", None, REPLY, OTHER | {"rank": 0}), "accepted"),
    tree("no ranks", node(QUESTION, "prompter", None, REPLY | {"rank": None}, OTHER | {"rank": None}), "accepted"),
    tree("a deleted reply", node(QUESTION, "prompter", None, REPLY | {"deleted": True}, OTHER), "accepted"),
    tree(
        "deleted is text", node(QUESTION, "prompter", None, REPLY | {"deleted": "false"}, OTHER), "either", no_complaint
    ),
    *(
        tree(f"a rank of {rank!r}", node(QUESTION, "prompter", None, REPLY | {"rank": rank}, OTHER), "refused")
        for rank in ("best", float("nan"), float("-inf"), True, [0], {}, 10**400)
    ),
    *(
        tree(f"replies are {replies!r}", {"text": QUESTION, "role": "prompter", "replies": replies}, "refused")
        for replies in (5, "x", {"a": 1}, [5], [None], ["x"], [{}], [{"text": "x"}], True)
    ),
    tree("a reply's role is unknown", node(QUESTION, "prompter", None, REPLY | {"role": "critic"}, OTHER), "refused"),
    tree(
        "a reply's role is a list", node(QUESTION, "prompter", None, REPLY | {"role": ["assistant"]}, OTHER), "refused"
    ),
    tree("a reply's text is a number", node(QUESTION, "prompter", None, REPLY | {"text": 5}, OTHER), "refused"),
    tree("a reply's text is empty", node(QUESTION, "prompter", None, REPLY | {"text": ""}, OTHER), "accepted"),
    tree("the assistant first", node("Hello.", "assistant", None, REPLY, OTHER), "accepted"),
    tree("nested 150 deep", deep_tree(75), "accepted"),
    tree("nested 50,000 deep", deep_tree(25_000), "refused"),
)


def flat_case(what: str, rows: list[Row], expected: Expected = "refused", complaint: Complaint = NEITHER) -> Case:
    return case(what, "flat", rows, expected, complaint)


CHAIN = [flat(n, n - 1 if n else None, ("prompter", "assistant")[n % 2], f"t {n}", 0) for n in range(5000)]
PAIR = [flat("r", "q", "assistant", CLAY[0], 0), flat("s", "q", "assistant", CLAY[1], 1)]
FLATS = (
    flat_case("nothing wrong", [flat("q", None, "prompter", QUESTION), *PAIR], "accepted", FIRST),
    flat_case("an empty parent", [flat("q", "", "prompter", QUESTION), *PAIR], "accepted", FIRST),
    flat_case("two that answer each other", [flat("a", "b", "assistant", "x"), flat("b", "a", "prompter", "y")]),
    flat_case("one that answers itself", [flat("a", "a", "assistant", "x")]),
    flat_case("no root", PAIR),
    flat_case("an id twice", [flat("q", None, "prompter", QUESTION), *PAIR, PAIR[0]]),
    *(
        flat_case(f"an id of {value!r}", [flat(value, None, "prompter", "x")])
        for value in (None, "", 1.5, [1], {}, True)
    ),
    *(
        flat_case(f"a parent of {value!r}", [flat("q", value, "prompter", "x")])
        for value in (1.5, [1], {"a": 1}, True, False)
    ),
    flat_case(
        "a parent as a number, an id as text", [flat("5", None, "prompter", "x"), flat("6", 5, "assistant", "y")]
    ),
    flat_case(
        "an id of zero",
        [flat(0, None, "prompter", QUESTION), *(row | {"parent": 0} for row in PAIR)],
        "accepted",
        FIRST,
    ),
    flat_case("a chain of 5,000", CHAIN, "accepted"),
    flat_case("a column that replies would stand in", [flat("q", None, "prompter", "x") | {"replies": [5]}], "either"),
)


def mutated(draw: random.Random) -> Case:
    """Sound rows, of which one was changed in one place."""
    shape = draw.choice(("tree", "flat"))
    rows = sound(shape)
    number = draw.randrange(len(rows))
    what, rows[number] = mutated_tree(rows[number], draw)
    return case(f"row {number + 1}: {what}", shape, [], "either", no_complaint, content=as_json_lines(rows))


AREA = Area(needs=(), named=(*TREES, *FLATS), mutated=mutated, share=0.03)
