"""Prepared rows as tokenize meets them, and what its settings make of them."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.fuzz.areas.params import CHECK
from tests.fuzz.areas.raw_rows import assistant, system, user
from tests.fuzz.case import Area, Case, Expected, put
from tests.fuzz.mutations import Raw, json_text, mutated_tree

Row = dict[str, Any]
SOUND: dict[str, Row] = {
    "sft": {"messages": [user("Q?"), assistant("A.")], "source": "mine"},
    "preference": {
        "prompt": [user("Q?")],
        "chosen": [assistant("A.")],
        "rejected": [assistant("B.")],
        "source": "mine",
    },
    "unpaired": {"prompt": [user("Q?")], "completion": [assistant("A.")], "label": True, "source": "mine"},
    "prompts": {"prompt": [user("Q?")], "facts": {"answer": 5}, "source": "mine"},
}
TEXT = {"text": "Once upon a time there was a film.", "source": "mine"}
DROP = {"on_unusable_row": "drop"}
ROWS = 4  # of a split


def case(what: str, kind: str, row: Any, expected: Expected, **settings: Any) -> Case:
    """One row among sound ones of the train split."""

    def prepare(folder: Path) -> None:
        for split in ("train", "validation", "test"):
            rows = [SOUND[kind]] * ROWS
            others = [row] if split == "train" else []
            put(folder / f"data/prepared/{split}/{kind}.jsonl", "".join(json_text(one) + "\n" for one in rows + others))

    return Case(f"{kind}: {what}", prepare, (f"tokenize_data@{kind}",), expected, {"tokenize_data": settings})


def values(kind: str, key: str, expected: Expected, *given: Any, **settings: Any) -> list[Case]:
    """A row in which one key has each of several values."""
    return [
        case(f"{key} is {str(value)[:50]!r}", kind, SOUND[kind] | {key: value}, expected, **settings) for value in given
    ]


def without(kind: str, key: str) -> Case:
    row = {name: value for name, value in SOUND[kind].items() if name != key}
    return case(f"no {key}", kind, row, "refused")


def chat(*messages: Row) -> Row:
    return {"messages": [*messages], "source": "mine"}


def weighted(first: Any, last: Any) -> Row:
    turns = [user("Q?"), assistant("A.") | {"weight": first}, user("R?"), assistant("B.") | {"weight": last}]
    return chat(*turns)


TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
ROW_CASES = (
    *(case("nothing wrong", kind, row, "accepted") for kind, row in SOUND.items()),
    *(without(kind, key) for kind, row in SOUND.items() for key in row if key != "facts"),
    *(case(f"is {row!r}", kind, row, "refused") for kind in SOUND for row in ([], None, 5, "x", {})),
    *(one for kind in SOUND for one in values(kind, "source", "refused", None, 5, ["a"], {}, True)),
    *(case("a text", kind, TEXT, "accepted") for kind in ("sft", "prompts")),
    *(case("a text", kind, TEXT, "refused") for kind in ("preference", "unpaired")),
    *(
        case(f"a text {text!r}", kind, TEXT | {"text": text}, "refused")
        for kind in ("sft", "prompts")
        for text in ("", " ", None, 5, ["a"], {}, True)
    ),
    *(
        case(f"a text {text[:20]!r}", kind, TEXT | {"text": text}, "either")
        for kind in ("sft", "prompts")
        for text in ("<|endoftext|>", "a<|user|>b", "\ud800", "\0", "\u2028", "x" * 100_000, "e\u0301")
    ),
    case("a text beside messages", "sft", SOUND["sft"] | TEXT, "either"),
    case("a text beside a prompt", "prompts", SOUND["prompts"] | TEXT, "either"),
    *(
        case(f"weights {first!r} and {last!r}", "sft", weighted(first, last), expected)
        for first, last, expected in (
            (1, 1, "accepted"),
            (0, 1, "accepted"),
            (1, 0, "accepted"),
            (None, 1, "accepted"),
            (0, 0, "accepted"),  # dropped
            *((value, 1, "refused") for value in (0.5, True, False, 2, -1, "1", [1], {}, float("nan"), 10**400)),
        )
    ),
    *values("unpaired", "label", "refused", None, 1, 0, "true", [True], float("nan"), Raw("9" * 5000)),
    *values("preference", "margin", "refused", -1, True, "x", [1], float("nan"), 1e39, 10**400),
    *values("preference", "margin", "accepted", None, 0, 1.5),
    *values("preference", "chosen", "refused", None, [], "A.", [user("A.")], [assistant("A."), assistant("B.")]),
    *values("preference", "chosen", "refused", [assistant("")], [assistant(5)], [{}], [5], {"role": "assistant"}),
    *values("prompts", "prompt", "refused", None, [], "Q?", [assistant("A.")], [user(5)], [{}], {"role": "user"}),
    *values("prompts", "facts", "refused", None, [], 5, "x", {"a": "\ud800"}),
    *values("sft", "messages", "refused", None, [], "x", [user("Q?")], [assistant("A.")], [5], [user("Q?"), {}]),
    *values("sft", "messages", "refused", [user("Q?"), assistant("A."), user("R?")], [system("S."), assistant("")]),
)
CONTEXT = (
    *(one for kind in SOUND for one in values(kind, "tools", "refused", 5, {}, "x", [5], [[]], [{"function": 5}])),
    *(one for kind in ("sft", "preference") for one in values(kind, "tools", "refused", [TOOL])),
    *values("sft", "tools", "accepted", [TOOL], **DROP),
    # Its name stands in the text anyway, which does not make it told.
    *values("sft", "tools", "refused", [{"name": "Q"}], [{"name": "user"}], [{"name": "f"}]),
    *values("sft", "tools", "either", [{}], [{"name": 5}], [{"name": None}], [], None),
    *(one for kind in SOUND for one in values(kind, "template_arguments", "refused", 5, [], "x", True)),
    *values(
        *("sft", "template_arguments", "refused", {"messages": []}, {"add_generation_prompt": False}),
        *({"tools": []}, {"chat_template": "x"}),
    ),
    *values("sft", "template_arguments", "either", {"eos_token": "A"}, {"bos_token": "x"}, {"raise_exception": 5}),
    *values("sft", "template_arguments", "either", {"self": 1}, {"": 1}, {"a b": 1}, {"range": 5}, {"\ud800": 1}),
    *values("sft", "template_arguments", "either", {"x": Raw("[" * 500 + "]" * 500)}, {"x": "{{ 1/0 }}"}),
)
LONG = "a very long film " * 60
LONG_ROWS = {
    "sft": chat(user(LONG), assistant("A.")),
    "preference": SOUND["preference"] | {"prompt": [user(LONG)]},
    "unpaired": SOUND["unpaired"] | {"completion": [assistant(LONG)]},
    "prompts": SOUND["prompts"] | {"prompt": [user(LONG)]},
}
TRUNCATION: tuple[tuple[Mapping[str, Any], Expected], ...] = (
    ({"truncation": "error"}, "refused"),
    ({"truncation": "drop"}, "accepted"),
    ({"truncation": "keep_end"}, "accepted"),
    ({"truncation": "keep_start"}, "accepted"),
    ({"truncation": "keep_end", "cut_replies": True}, "accepted"),
    ({"truncation": "keep_start", "cut_replies": True, "max_completion_length": 1}, "accepted"),
    ({"truncation": "keep_end", "max_prompt_length": 1}, "either"),
    ({"truncation": "keep_end", "max_length": 2, "max_prompt_length": 1}, "either"),
)
SETTINGS = tuple(
    case(f"a long row with {given}", kind, row, expected, **given)
    for kind, row in LONG_ROWS.items()
    for given, expected in TRUNCATION
)
WRONG_SETTINGS: tuple[Mapping[str, Any], ...] = (
    {"max_prompt_length": 192},
    {"max_length": 193},
    {"max_completion_length": 193},
    {"max_completion_length": 0},
    {"cut_replies": True},
    {"cut_replies": True, "truncation": "drop"},
    {"truncation": "keep"},
    {"loss_on": "last"},
    {"text_prompt_tokens": []},
    {"text_prompt_tokens": [2]},
    {"text_prompt_tokens": [7, 2]},
    {"text_prompt_tokens": [0, 2]},
    {"text_prompt_tokens": [1, 2, 3]},
    {"text_prompt_tokens": [1.0, 2]},
    {"text_prompt_tokens": [True, 2]},
    {"text_prompt_tokens": 5},
    {"text_prompt_tokens": "2-7"},
)
OF_SETTINGS = (
    *(
        case(f"{given}", "prompts", TEXT, "refused", **given)._replace(stages=(*CHECK, "tokenize_data@prompts"))
        for given in WRONG_SETTINGS
    ),
    *(
        case(f"{given}", kind, TEXT, "accepted", **given)
        for kind in ("sft", "prompts")
        for given in (
            {"text_prompt_tokens": [2, 7]},
            {"text_prompt_tokens": [1, 1]},
            {"text_prompt_tokens": [1_000_000, 2_000_000]},
            {"loss_on": "last_reply"},
        )
    ),
)


def file_case(what: str, kind: str, act: Callable[[Path], object]) -> Case:
    def prepare(folder: Path) -> None:
        act(folder / f"data/prepared/test/{kind}.jsonl")

    return Case(f"{kind}: the test rows are {what}", prepare, (f"tokenize_data@{kind}",), "refused")


FILES = tuple(
    file_case(what, kind, act)
    for kind in ("sft", "prompts")
    for what, act in (
        ("gone", lambda path: path.unlink()),
        ("nothing", lambda path: put(path, "")),
        ("white space", lambda path: put(path, " \n\n")),
        ("not UTF-8", lambda path: put(path, b'{"a": "\xff"}\n')),
        ("half a line", lambda path: put(path, path.read_bytes()[:-20])),
        ("nested deeply", lambda path: put(path, "[" * 100_000 + "\n")),
    )
)


def mutated(draw: random.Random) -> Case:
    """One place of one row changed."""
    kind = draw.choice([*SOUND])
    what, row = mutated_tree(draw.choice((SOUND[kind], LONG_ROWS[kind])), draw)
    settings = draw.choice(({}, DROP, {"truncation": "keep_end"}, {"truncation": "drop"}))
    return case(f"{what} ({json.dumps(settings)})", kind, row, "either", **settings)


AREA = Area(
    needs=("data/prepared", "models/base"),
    named=(*ROW_CASES, *CONTEXT, *SETTINGS, *OF_SETTINGS, *FILES),
    mutated=mutated,
    share=0.06,
)
