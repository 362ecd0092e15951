"""Trees of messages with ranked replies, nested and flat."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.command.errors import StageError
from stages.lib.data.conversations import MalformedRowError, UnusableRowError
from stages.lib.data.readers.reply_trees import trees_of_rows
from tests.lib.data.reading import options, read, said
from tests.lib.data.test_formats import bot, user

TREE = {"type": "tree"}
FLAT = {"type": "tree", "root": None, "id_key": "id", "parent_key": "parent"}


def ask(text, *replies, **other):
    return {"role": "prompter", "text": text, "replies": [*replies]} | other


def say(text, rank, *replies, **other):
    return {"role": "assistant", "text": text, "rank": rank, "replies": [*replies]} | other


def pairs(row, comparison=TREE, counts=None):
    return [said(example) for example in read(row, "comparison", comparison=comparison, counts=counts)]


def test_ranked_replies_at_every_depth_are_pairs_after_their_own_path():
    more = ask("and milk", say("no", 1), say("a drop", 0), rank=0)
    other = ask("sugar", say("sweet", None))
    tree = ask("tea", say("maybe", 1), say("yes", 0, more, other), say("never", 2))
    counts = Counter()
    tea = [user("tea")]
    assert pairs({"prompt": tree}, counts=counts) == [
        (tea, "yes", "maybe"),
        (tea, "maybe", "never"),
        (tea, "yes", "never"),
        ([*tea, bot("yes"), user("and milk")], "a drop", "no"),
    ]
    assert counts == {"responses_left_out/no_rank": 1}
    best = pairs({"prompt": tree}, TREE | {"pairs": "best_against_worst", "best": "highest"})
    assert best[0] == (tea, "never", "yes")


def test_deleted_replies_and_what_follows_them_are_left_out():
    gone = say("rude", 1, ask("what?", say("x", 0), say("y", 1)), deleted=True)
    counts = Counter()
    assert pairs({"prompt": ask("tea", say("yes", 0), gone, say("no", 2))}, counts=counts) == [
        ([user("tea")], "yes", "no")
    ]
    assert counts == {"responses_left_out/deleted": 1}


def test_a_tree_without_a_choice_is_dropped():
    with pytest.raises(UnusableRowError, match=r"^single_response$"):
        pairs({"prompt": ask("tea", say("yes", 0))})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "tea"}, "here: expected a message with 'text', found str"),
        ({}, "here: expected a message with 'text', found NoneType"),
        ({"prompt": {"text": "tea"}}, "here: expected a message with 'role', found text"),
        ({"prompt": ask("tea", {"role": "judge", "text": "x"})}, "here, reply 1: unknown role 'judge'"),
        ({"prompt": ask("tea", say("x", "first"))}, "here, reply 1, 'rank': expected a number, found 'first'"),
        ({"prompt": ask("tea") | {"replies": "none"}}, "here, 'replies': expected a list"),
        ({"prompt": ask("tea", say("x", 0, ask("y", say(5, 0))))}, "here, reply 1, reply 1, reply 1, 'text': expected"),
    ],
)
def test_what_is_no_tree_is_told_with_its_place(row, message):
    with pytest.raises(MalformedRowError) as caught:
        pairs(row)
    assert message in str(caught.value)


def flat_rows(node, parent, rows):
    """The rows of a flat file that says what a tree does."""
    identity = f"m{len(rows)}"
    rows.append({key: value for key, value in node.items() if key != "replies"} | {"id": identity, "parent": parent})
    for reply in node["replies"]:
        flat_rows(reply, identity, rows)
    return rows


@st.composite
def trees(draw, depth=3, asks=True):
    replies = draw(st.lists(trees(depth - 1, not asks), max_size=3)) if depth else []
    text = f"t{draw(st.integers(0, 10**9))}"
    if asks:
        return ask(text, *replies)
    return say(text, draw(st.none() | st.integers(0, 2)), *replies)


@given(st.lists(trees(), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_a_flat_file_gives_the_pairs_of_its_trees(given_trees, shuffler: random.Random):
    rows = []
    for tree in given_trees:
        flat_rows(tree, None, rows)
    shuffler.shuffle(rows)
    settings = options(comparison=FLAT).comparison
    flat = [row for _, row in trees_of_rows([("here", row) for row in rows], settings)]

    def all_pairs(trees_given, comparison, wrap):
        found = Counter()
        for tree in trees_given:
            try:
                found.update(repr(pair) for pair in pairs(wrap(tree), comparison))
            except UnusableRowError:
                continue
        return found

    # Each pair is made once, of whichever order its two replies stand in: ranks decide, and ties give none.
    nested = all_pairs(given_trees, TREE, lambda tree: {"prompt": tree})
    assert all_pairs(flat, FLAT, lambda tree: tree) == nested


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 1, "parent": None}, {"id": 1, "parent": None}], "row 2: the id 1 stands twice, first at row 1"),
        ([{"id": 1, "parent": 7}], "row 1: it answers the message 7, which is not among the rows"),
        ([{"parent": None}], "row 1: expected the id of a message in 'id', found nothing"),
        ([{"id": "", "parent": None}], "row 1: expected the id of a message in 'id', found nothing"),
        ([{"id": True, "parent": None}], "row 1: expected the id of a message in 'id', found bool"),
        ([{"id": 1, "parent": None}, {"id": 2, "parent": True}], "row 2: expected the id of a message in 'parent'"),
        ([{"id": 1, "parent": 2}, {"id": 2, "parent": 1}], "row 1 and the rows after it: messages answer each other"),
        ([{"id": 0, "parent": None}, {"id": 1, "parent": 1}], "messages answer each other in a circle"),
        ([{"id": 1, "parent": [2]}], "row 1: expected the id of a message in 'parent', found list"),
    ],
)
def test_a_flat_file_that_is_no_trees_is_refused(rows, message):
    settings = options(comparison=FLAT).comparison
    with pytest.raises(StageError) as caught:
        [*trees_of_rows([(f"row {number}", row) for number, row in enumerate(rows, 1)], settings)]
    assert message in str(caught.value)
