"""Rows of any content: each is read as what its own texts say, or refused in one of the ways that callers know."""

import json
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from stages.lib.command.errors import StageError
from stages.lib.data.detection import FormatOfRows
from stages.lib.data.formats import COLUMNS, READERS, examples_of
from stages.lib.data.message_cells import with_messages_read, without_keys
from stages.lib.data.row_errors import UnusableRowError
from tests.lib.data.reading import options

ODD_TEXTS = ["", " ", "yes\n", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a", "[1]", "\ud83d", "{}", "true"]
TEXTS = st.sampled_from([*(f"tea {number}" for number in range(40)), *ODD_TEXTS])
PLAIN = st.none() | st.booleans() | st.integers(-1, 2) | st.floats(0, 1) | TEXTS
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "function_call", "prompter", "x", None])
BESIDE = {"weight": PLAIN, "tool_calls": PLAIN, "name": PLAIN, "text": PLAIN, "rank": PLAIN, "replies": PLAIN}
MESSAGES = st.fixed_dictionaries({"role": ROLES, "content": PLAIN}, optional=BESIDE)
MESSAGES |= st.fixed_dictionaries({"from": ROLES, "value": PLAIN})
# What mostly is a conversation: the roles in turn, and texts.
TURNS = st.lists(TEXTS, min_size=1, max_size=4).map(
    lambda texts: [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
)
INNER = st.lists(PLAIN | MESSAGES, max_size=3)
VALUES = PLAIN | MESSAGES | INNER | st.lists(INNER, max_size=2)
VALUES |= st.builds(lambda messages: {"messages": messages}, INNER | TURNS)
CELLS = VALUES | VALUES.map(repr) | VALUES.map(json.dumps)
REPLIES = TEXTS | TURNS | st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c"])
# What mostly stands in a column; a tenth of the cells hold anything.
USUAL = {
    "prompt": TEXTS | TURNS | st.builds(lambda turns: {"text": "a", "role": "user", "replies": turns}, INNER),
    "messages": TURNS | TURNS.map(repr),
    "conversations": TURNS | TURNS.map(json.dumps),
    "input": TURNS.map(lambda turns: {"messages": turns}),
    **dict.fromkeys(("chosen", "rejected", "completion", "preferred_output", "non_preferred_output"), REPLIES),
    **dict.fromkeys(("a", "b"), TEXTS),
    "responses": st.lists(TEXTS | MESSAGES, min_size=1, max_size=3) | TURNS,
    "scores": st.lists(PLAIN, min_size=1, max_size=3) | st.just([0, 5]),
    "won": PLAIN,
    "label": st.booleans(),
}
SELDOM = st.sampled_from([False] * 9 + [True])
OPTIONS = {
    "as they are": options(),
    "template": options(input_template="Q: {}"),
    "threshold": options(threshold={"score": "scores"}),
    "winner": options(comparison={"type": "winner", "responses": ["a", "b"], "winner": ["won"]}),
    "scores": options(comparison={"type": "scores", "ties": "keep", "margin": "gap"}),
    "labels": options(comparison={"type": "scores"}, threshold={"score": None}),
    "order": options(comparison={"type": "order", "text_key": "content", "pairs": "best_against_worst"}),
    "tree": options(comparison={"type": "tree"}),
}
NEEDED = {
    "winner": ("prompt", "a", "b", "won"),
    "scores": ("prompt", "responses", "scores"),
    "labels": ("prompt", "responses", "scores"),
    "order": ("prompt", "responses"),
    "tree": ("prompt",),
}
NAMES = st.sampled_from([*sorted(COLUMNS), "responses", "scores", "won", "a", "b"])


@st.composite
def rows(draw):
    """A row that has the columns of some format or comparison, and often others, or lacks one; and how it is read."""
    reading = draw(st.sampled_from([*OPTIONS, *["as they are"] * 6]))
    named = draw(st.sampled_from(["auto", *READERS]))
    needed = NEEDED.get(reading) or (READERS[named].columns if named != "auto" else ())
    row = {column: draw(CELLS if draw(SELDOM) else USUAL.get(column, TEXTS)) for column in needed}
    if draw(SELDOM):
        row |= draw(st.dictionaries(NAMES, CELLS, max_size=2))
    if draw(SELDOM) and row:
        row.pop(draw(st.sampled_from(sorted(row))))
    if reading in NEEDED and draw(st.booleans()):
        named = "auto"
    return row, named, OPTIONS[reading]


def read_or_refuse(drawn, seen):
    row, named, reading = drawn
    try:
        row = without_keys(with_messages_read(row, "here"), ["name"])
        name = FormatOfRows(named, reading).of(row, "here")
        examples = examples_of(row, name, reading, "here")
    except (UnusableRowError, StageError) as error:
        told = str(error)
        examples = None
    if examples is None:
        assert told.replace("_", "").isalpha() or "here" in told or named in told
        return
    assert examples
    seen[name] += 1
    for example in examples:
        keeps_to_the_rules(example)


def test_any_row_is_read_or_refused_in_words():
    seen = Counter()
    settings(max_examples=1500)(given(rows())(lambda drawn: read_or_refuse(drawn, seen)))()
    assert len(seen) >= len(READERS) - 2, "rows of most formats were read"


def keeps_to_the_rules(example):
    if example.text is not None:
        assert example.text.strip()
        assert (example.prompt, example.reply, example.rejected, example.label) == ([], None, None, None)
        return
    for reply in (example.reply, example.rejected):
        assert reply is None or (reply["role"] == "assistant" and (reply["content"].strip() or reply["tool_calls"]))
    assert example.reply is not None or (example.rejected is None and example.label is None)
    assert example.reply != example.rejected or example.reply is None
    assert example.prompt[-1]["role"] in ("user", "tool")
    for message in example.prompt:
        assert message["role"] in ("system", "user", "assistant", "tool")
        assert isinstance(message["content"], str)
        assert "name" not in message
    assert example.margin is None or example.margin >= 0
    json.dumps([example.prompt, example.reply, example.rejected], ensure_ascii=False, allow_nan=False).encode()
