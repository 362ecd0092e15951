"""Comparisons of responses: which pairs are made, which is better, what is counted."""

import json
from collections import Counter
from itertools import combinations, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.command.errors import StageError
from stages.lib.data.conversations import MalformedRowError, UnusableRowError
from stages.lib.data.readers.comparisons import label_by, pairs_by
from tests.lib.data.reading import options, read, said
from tests.lib.data.test_formats import bot, hh, system, user

TWO = {"type": "winner", "responses": ["a", "b"], "winner": ["won"]}
ROW = {"prompt": "tea", "a": "yes", "b": "no"}


def replies(row, comparison, **changed):
    """(chosen, rejected) of each pair of a row."""
    return [said(example)[1:] for example in read(row, "comparison", comparison=comparison, **changed)]


YES, NO = [("yes", "no")], [("no", "yes")]


@pytest.mark.parametrize(
    ("first", "second", "votes"),
    [
        ([0], [1], [(0, YES), (1, NO), ("0", YES), ("1", NO), (0.0, YES), ("1.0", NO), (False, None)]),
        ([1], [2], [(1, YES), (2, NO), ("2 ", NO), (0, None)]),
        ([True], [False], [(True, YES), (False, NO), ("True", YES), ("false", NO), (1, None)]),
        (["A"], ["B"], [("A", YES), ("B", NO), (" A", YES), ("a", None)]),
        (["a", 1], ["b", 2], [("a", YES), (2, NO), ("b", NO)]),
        ([-3, -2, -1], [1, 2, 3], [(-2, YES), (3, NO), ("-1", YES), (0, None)]),
    ],
)
def test_the_better_response_is_the_one_that_the_vote_stands_for(first, second, votes):
    comparison = TWO | {"first": first, "second": second}
    for vote, pairs in votes:
        if pairs is not None:
            assert replies(ROW | {"won": vote}, comparison) == pairs, vote
            continue
        with pytest.raises(
            StageError, match=r"here, 'won': the vote .* is known for neither response: first"
        ) as caught:
            replies(ROW | {"won": vote}, comparison)
        assert not isinstance(caught.value, MalformedRowError)  # which `on_unusable_row: drop` would leave out


def test_ties_are_left_out_or_kept_in_both_orders_and_counted():
    comparison = TWO | {"tie": ["tie"], "margin": "gap"}
    counts = Counter()
    with pytest.raises(UnusableRowError, match=r"^tie$"):
        replies(ROW | {"won": "tie"}, comparison, counts=counts)
    assert counts == {"pairs_left_out/tie": 1}
    counts = Counter()
    examples = read(ROW | {"won": "tie"}, "comparison", comparison=comparison | {"ties": "keep"}, counts=counts)
    assert [said(example)[1:] for example in examples] == YES + NO
    assert [example.margin for example in examples] == [0.0, 0.0]
    assert counts == {"pairs_kept/tie": 2}


def test_the_majority_of_several_votes_wins_by_its_lead():
    comparison = TWO | {"winner": ["won", "also"], "first": ["A"], "second": ["B"], "tie": ["="], "margin": "gap"}
    for won, also, pairs, lead in [
        (["A", "A", "B"], "A", YES, 2.0),
        ('["B", "="]', None, NO, 1.0),
        ("A", "", YES, 1.0),
        (["=", "B", "B", "B"], ["A"], NO, 2.0),
    ]:
        (example,) = read(ROW | {"won": won, "also": also}, "comparison", comparison=comparison)
        assert ([said(example)[1:]], example.margin) == (pairs, lead)
    with pytest.raises(UnusableRowError, match=r"^tie$"):
        replies(ROW | {"won": ["A"], "also": "B"}, comparison)
    with pytest.raises(UnusableRowError, match=r"^small_gap$"):
        replies(ROW | {"won": ["A"], "also": "="}, comparison | {"least_gap": 2.0})
    for nobody in ((None, None), ([], ""), ("", "[]")):
        with pytest.raises(UnusableRowError, match=r"^no_vote$"):
            replies(ROW | dict(zip(("won", "also"), nobody, strict=True)), comparison)


def test_a_vote_may_name_what_the_row_says_a_response_is_of():
    comparison = TWO | {"first": [], "second": [], "names": ["of_a", "of_b"], "tie": ["tie"]}
    row = ROW | {"of_a": "m1", "of_b": "m2"}
    assert replies(row | {"won": "m1"}, comparison) == YES
    assert replies(row | {"won": "m2"}, comparison) == NO
    with pytest.raises(StageError, match=r"the vote 'm3' .* first is m1, second m2, tie tie; say in comparison"):
        replies(row | {"won": "m3"}, comparison)
    for same in ("m1", None):
        with pytest.raises(UnusableRowError, match=r"^same_names$"):
            replies(row | {"of_b": same, "won": "m1"}, comparison)


@given(st.lists(st.text("xyz ", min_size=1).filter(str.strip), min_size=2, max_size=2, unique=True), st.booleans())
def test_no_label_is_ever_reversed(texts, second_wins):
    row = {"prompt": "p", "a": texts[0], "b": texts[1], "won": int(second_wins)}
    (chosen, rejected) = replies(row, TWO)[0]
    assert (chosen, rejected) == (texts[second_wins], texts[not second_wins])
    swapped = {"prompt": "p", "a": texts[1], "b": texts[0], "won": int(not second_wins)}
    assert replies(swapped, TWO) == [(chosen, rejected)]
    of_scores = {"prompt": "p", "responses": texts, "scores": [float(not second_wins), float(second_wins)]}
    assert replies(of_scores, {"type": "scores"}) == [(chosen, rejected)]
    best_last = {"prompt": "p", "responses": [rejected, chosen]}
    assert replies(best_last, {"type": "order", "best": "last"}) == [(chosen, rejected)]


SCORES = st.lists(st.integers(-3, 3).map(float), min_size=0, max_size=6)


@given(SCORES, st.sampled_from([0.0, 1.0, 2.5]), st.sampled_from(["drop", "keep"]))
def test_all_pairs_are_made_or_have_a_reason(scores, least_gap, ties):
    settings = options(comparison={"type": "scores", "least_gap": least_gap, "ties": ties}).comparison
    made = [*pairs_by(scores, settings)]
    kept = {(better, worse) for better, worse, _, reason in made if reason is None}
    expected = set()
    for left, right in permutations(range(len(scores)), 2):
        gap = scores[left] - scores[right]
        if (gap > 0 and gap >= least_gap) or (gap == 0 and ties == "keep"):
            expected.add((left, right))
    assert kept == expected
    assert all(gap == scores[better] - scores[worse] for better, worse, gap, _ in made)
    two = {frozenset((better, worse)) for better, worse, _, _ in made}
    assert two == {frozenset(both) for both in combinations(range(len(scores)), 2)}
    tied = [reason for better, worse, gap, reason in made if gap == 0]
    assert all((reason == "tie") == (ties == "drop") for reason in tied)


@given(SCORES)
def test_the_best_goes_against_the_worst(scores):
    settings = options(comparison={"type": "scores", "pairs": "best_against_worst"}).comparison
    made = [*pairs_by(scores, settings)]
    assert len(made) == (len(scores) > 1)
    for better, worse, gap, reason in made:
        assert (scores[better], scores[worse], gap) == (max(scores), min(scores), max(scores) - min(scores))
        assert reason == ("tie" if gap == 0 else None)
        assert better != worse


def test_responses_without_score_or_words_take_no_part_and_are_counted():
    row = {"prompt": "tea", "responses": ["a", "b", " ", "c"], "scores": [1, None, 5, "2.5"]}
    counts = Counter()
    assert replies(row, {"type": "scores"}, counts=counts) == [("c", "a")]
    assert counts == {"responses_left_out/no_score": 1, "responses_left_out/empty_reply": 1}
    with pytest.raises(UnusableRowError, match=r"^single_response$"):
        replies(row | {"scores": [1, None, 5, None]}, {"type": "scores"})


def test_pairs_that_break_a_rule_are_left_out_one_by_one():
    row = {"prompt": "tea", "responses": ["a", "a", "c"], "scores": [1, 2, 3]}
    counts = Counter()
    assert replies(row, {"type": "scores"}, counts=counts) == [("c", "a"), ("c", "a")]
    assert counts == {"pairs_left_out/equal_replies": 1}
    with pytest.raises(UnusableRowError, match=r"^equal_replies$"):
        replies(row | {"responses": ["a", "a"], "scores": [1, 2]}, {"type": "scores"})


@pytest.mark.parametrize("best", ["highest", "lowest"])
def test_ranks_and_scores_count_the_other_way_round(best):
    comparison = {"type": "scores", "best": best, "margin": "gap"}
    (example,) = read({"prompt": "tea", "responses": ["x", "y"], "scores": [1, 4]}, "comparison", comparison=comparison)
    assert said(example)[1:] == (("y", "x") if best == "highest" else ("x", "y"))
    assert example.margin == 3.0


@pytest.mark.parametrize(
    "value",
    [
        [{"t": "yes", "s": 2, "of": "m"}, {"t": "no", "s": 1, "of": "n"}],
        {"t": ["yes", "no"], "s": [2, 1]},
        json.dumps([{"t": "yes", "s": 2}, {"t": "no", "s": 1}]),
        str([{"t": "yes", "s": 2}, {"t": "no", "s": 1}]),
        [{"t": [bot("yes")], "s": 2}, {"t": bot("no"), "s": 1}],
        [{"t": [user("tea"), bot("yes")], "s": 2}, {"t": "no", "s": "1"}],
    ],
)
def test_responses_that_hold_their_score(value):
    comparison = {"type": "scores", "responses": ["r"], "text_key": "t", "scores": [], "score_key": "s"}
    assert replies({"prompt": "tea", "r": value}, comparison) == YES


@pytest.mark.parametrize(
    ("given_prompt", "prompt"),
    [
        ({"prompt": "tea"}, [user("tea")]),
        ({"prompt": [system("s"), user("tea")]}, [system("s"), user("tea")]),
        ({"prompt": hh("hello", "hi", "tea")}, [user("hello"), bot("hi"), user("tea")]),
        ({"instruction": "tea", "input": "with milk"}, [user("tea\n\nwith milk")]),
        ({"question": "tea", "context": "It rains."}, [user("It rains.\n\ntea")]),
        ({"messages": [user("tea")]}, [user("tea")]),
        ({"conversations": [{"from": "human", "value": "tea"}], "system": "s"}, [system("s"), user("tea")]),
    ],
)
def test_the_prompt_of_a_comparison_stands_in_any_of_its_columns(given_prompt, prompt):
    (example,) = read({"a": "yes", "b": "no", "won": 0} | given_prompt, "comparison", comparison=TWO)
    assert said(example) == (prompt, "yes", "no")


def test_without_a_prompt_responses_are_whole_conversations():
    row = {"a": [user("tea"), bot("yes")], "b": [user("tea"), bot("no")], "won": 0}
    (example,) = read(row, "comparison", comparison=TWO)
    assert said(example) == ([user("tea")], "yes", "no")
    (example,) = read({"a": hh("tea", "yes"), "b": hh("tea", "no"), "won": 1}, "comparison", comparison=TWO)
    assert said(example) == ([user("tea")], "no", "yes")
    with pytest.raises(UnusableRowError, match=r"^prompt_mismatch$"):
        read(row | {"b": [user("milk"), bot("no")]}, "comparison", comparison=TWO)
    with pytest.raises(StageError, match="here, 'a': a response of text needs its prompt"):
        read({"a": "yes", "b": "no", "won": 0}, "comparison", comparison=TWO)


def test_a_margin_of_the_row_stands_beside_a_winner_unless_the_gap_is_it():
    row = ROW | {"won": 0, "margin": 0.5}
    assert read(row, "comparison", comparison=TWO)[0].margin == 0.5
    assert read(row, "comparison", comparison=TWO | {"margin": "gap"})[0].margin == 1.0


@pytest.mark.parametrize("scores", [[-1e308, 1e308], [0, 1e39]])
def test_a_gap_that_no_float32_holds_is_no_margin(scores):
    row = {"prompt": "tea", "responses": ["a", "b"], "scores": scores}
    assert read(row, "comparison", comparison={"type": "scores"})[0].margin is None
    with pytest.raises(MalformedRowError, match="here, 'margin': expected a finite number of at least 0"):
        read(row, "comparison", comparison={"type": "scores", "margin": "gap"})


def test_scores_become_labels_by_a_threshold():
    row = {"prompt": "tea", "responses": ["a", "b", "c", "d"], "scores": [1, 5, 4.9, 3]}
    counts = Counter()
    threshold = {"score": None, "good_from": 5.0, "bad_below": 3.0}
    examples = read(row, "comparison", comparison={"type": "scores"}, threshold=threshold, counts=counts)
    assert [(said(example)[1], example.label, example.score) for example in examples] == [
        ("a", False, 1),
        ("b", True, 5),
    ]
    assert all(example.rejected is None for example in examples)
    assert counts == {"responses_left_out/between_thresholds": 2}
    single = {"prompt": "tea", "completion": "yes", "stars": "2"}
    threshold["score"] = "stars"
    (example,) = read(single, "prompt_completion", threshold=threshold)
    assert (example.label, example.score) == (False, 2.0)
    for stars, reason in ((4, "between_thresholds"), (None, "no_score")):
        with pytest.raises(UnusableRowError, match=rf"^{reason}$"):
            read(single | {"stars": stars}, "prompt_completion", threshold=threshold)
    for stars in ("many", True, float("nan")):
        with pytest.raises(MalformedRowError, match="here, 'stars': expected a finite number"):
            read(single | {"stars": stars}, "prompt_completion", threshold=threshold)
    with pytest.raises(MalformedRowError, match=r"here, 'stars': float32 does not hold the score 1e\+39"):
        read(single | {"stars": 1e39}, "prompt_completion", threshold=threshold)


@given(st.floats(-9, 9), st.floats(-9, 9), st.floats(0, 9))
def test_a_label_is_good_bad_or_neither(score, bad_below, width):
    threshold = options(threshold={"bad_below": bad_below, "good_from": bad_below + width}).threshold
    label = label_by(score, threshold)
    assert (label is True) == (score >= bad_below + width)
    assert (label is False) == (score < bad_below)


@pytest.mark.parametrize(
    ("row", "comparison", "message"),
    [
        ({"prompt": "p", "a": "x", "won": 0}, TWO, "here: no column 'b' to compare, found prompt, a, won"),
        (ROW, TWO, "here: no column 'won' to compare"),
        ({"prompt": "p", "r": ["x"], "won": 0}, TWO | {"responses": ["r"]}, "here: expected two responses, found 1"),
        ({"prompt": "p", "r": 5, "won": 0}, TWO | {"responses": ["r"]}, "here, 'r': expected a list, found int"),
        ({"prompt": "p", "r": "x", "won": 0}, TWO | {"responses": ["r"]}, "here, 'r': not valid JSON"),
        (
            {"prompt": "p", "responses": ["x", "y"], "scores": [1]},
            {"type": "scores"},
            "here: 2 responses and 1 scores; each needs its own",
        ),
        (
            {"prompt": "p", "responses": ["x", "y"], "scores": [1, "high"]},
            {"type": "scores"},
            "here, 'scores', 2: expected a finite number, found 'high'",
        ),
        (
            {"prompt": "p", "responses": ["x", "y"], "scores": [1, 2]},
            {"type": "scores", "text_key": "t"},
            "here, 'responses', 1: expected an object with 't'",
        ),
        (ROW | {"question": "p", "won": 0}, TWO, "here: the columns prompt and question could each hold the prompt"),
        (ROW | {"won": 0, "a": 5}, TWO, "here, 'a': expected text, found int"),
    ],
)
def test_what_a_comparison_cannot_be_is_told(row, comparison, message):
    with pytest.raises(StageError) as caught:
        read(row, "comparison", comparison=comparison)
    assert message in str(caught.value)


def test_a_comparison_and_a_format_must_go_together():
    with pytest.raises(StageError, match="format comparison needs the setting comparison"):
        read(ROW, "comparison")
    with pytest.raises(StageError, match="comparison is set, and format is 'preference'"):
        read(ROW | {"won": 0}, "preference", comparison=TWO)
    with pytest.raises(StageError, match="threshold makes unpaired data of single replies, and format 'hh'"):
        read(ROW, "hh", threshold={})
