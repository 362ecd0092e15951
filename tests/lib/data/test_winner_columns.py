"""No message of ours leads to reversed labels: a column that may say who won is described, or ignored by name."""

import pytest

from stages.lib.command.errors import StageError
from stages.lib.data.conversations import MalformedRowError
from stages.lib.data.detection import detect_format
from stages.lib.data.winner_columns import names_a_winner
from tests.lib.data.reading import one_example, said
from tests.lib.data.test_formats import PAIRS, bot, user

PAIR = {"prompt": "tea", "chosen": "yes", "rejected": "no"}
RENAMED = {"response_0": "chosen", "response_1": "rejected"}


@pytest.mark.parametrize(
    "column",
    [
        "winner",
        "better_response_id",
        "safer_response_id",
        "preference",
        "overall_preference",
        "preferredAnswer",
        "human_choice",
        "labels",
        "Verdict",
        "votes",
        "rank",
        "is_best",
        "judgment_gpt4",
    ],
)
def test_a_column_named_after_a_winner_is_refused_beside_every_pair(column):
    assert names_a_winner(column)
    for name, row in PAIRS.items():
        with pytest.raises(StageError, match=rf"here: the column '{column}' may say .* in comparison .*ignore_columns"):
            one_example(row | {column: "x"}, name)
        assert one_example(row | {column: None}, name)
    with_fact = one_example(PAIR | {column: 1}, "preference", facts={column: 1})
    assert said(with_fact) == ([user("tea")], "yes", "no")


@pytest.mark.parametrize(
    "column",
    [
        "id",
        "source",
        "twin",
        "chosen_model",
        "score_chosen",
        "rejected_rating",
        "is_response_0_safe",
        "prompt_id",
        "model",
        "wonder",
    ],
)
def test_other_columns_may_stand_there(column):
    assert not names_a_winner(column)
    assert one_example(PAIR | {column: 1}, "preference")


@pytest.mark.parametrize(
    "value", [0, 1, 2, -1, 1.0, "0", "B", "a", True, "False", "response_1", "model_a", "tie", "left", [0, 1, 1], ["A"]]
)
def test_beside_replies_that_were_named_by_hand_a_vote_is_told_by_its_value(value):
    row = PAIR | {"annotation": value}
    with pytest.raises(StageError, match="here: the column 'annotation' may say which"):
        one_example(row, "preference", renames=RENAMED)
    assert one_example(row, "preference", facts={"annotation": value}, renames=RENAMED)
    assert one_example(row, "preference", renames={"question": "prompt"})


def test_a_fact_that_names_the_winner_does_not_leave_named_replies_as_they_are():
    facts = {"better_response_id": 1}
    with pytest.raises(StageError, match="here: the column 'better_response_id' may say which"):
        one_example(PAIR, "preference", facts=facts, renames=RENAMED)
    assert one_example(PAIR, "preference", facts=facts, renames={"query": "prompt"}).facts == facts
    assert one_example(PAIR, "preference", facts={"better_response_id": None}, renames=RENAMED)


@pytest.mark.parametrize("value", [7, 0.5, "A long text", "id-17", [0, "of"], {"a": 7}, "response_2", None, ""])
def test_what_can_be_no_vote_may_stand_there(value):
    assert one_example(PAIR | {"annotation": value}, "preference", renames=RENAMED)


def test_every_message_that_asks_for_columns_to_be_named_speaks_of_comparison():
    two = {"prompt": "tea", "response_0": "yes", "response_1": "no", "better_response_id": 1}
    with pytest.raises(StageError, match=r"say in columns which of yours is which; .* describe that in comparison"):
        detect_format(two, "here")
    with pytest.raises(StageError, match=r"say in columns which of yours is which; .* describe that in comparison"):
        one_example(two, "preference")


AB = {"answer_0": "chosen", "answer_1": "rejected"}


@pytest.mark.parametrize(
    ("beside", "renames", "named"),
    [
        ({"score_0": -0.5, "score_1": 0.5}, AB, "'score_0' is -0.5 for chosen and 'score_1' 0.5 for rejected"),
        ({"score_0": "5.5", "score_1": "4"}, AB, "'score_0' is 5.5 for chosen"),
        ({"a_score": 0.25, "b_score": 0.75}, {"a": "chosen", "b": "rejected"}, "'a_score' is 0.25 for chosen"),
        ({"overall_a": 1.5, "overall_b": 4.5}, {"a": "chosen", "b": "rejected"}, "'overall_a' is 1.5 for chosen"),
        ({"rating_a": 1, "rating_b": 3}, {"a": "chosen", "b": "rejected"}, "'rating_a' is 1 for chosen"),
        ({"gpt4_a": 15, "gpt4_b": 45}, {"a": "chosen", "b": "rejected"}, "'gpt4_a' is 15 for chosen"),
        ({"gpt4": {"a": 15, "b": 45}}, {"a": "chosen", "b": "rejected"}, "'gpt4.a' is 15 for chosen"),
        ({"meta": {"reward_gap": 7.5}}, AB, "the column 'meta.reward_gap' may say"),
        ({"human_rating": [15, 45]}, AB, "the column 'human_rating' may say"),
        ({"score_a": 9.5}, {"a": "preferred_output", "b": "non_preferred_output"}, "the column 'score_a' may say"),
        ({"score_chosen": 5.5, "score_rejected": 8.5}, AB, "'score_chosen' is 5.5 for chosen"),
        ({"score_chosen": 5.5, "score_rejected": 8.5}, {}, "'score_chosen' is 5.5 for chosen"),
        ({"rejected-rating": 5.5, "chosen-rating": 4}, {}, "'chosen-rating' is 4 for chosen"),
        ({"rewards": {"chosen": 1.25, "rejected": 5.25}}, {}, "'rewards.chosen' is 1.25 for chosen"),
        (
            {"score_chosen": 8.5, "score_rejected": 5.5},
            {"chosen": "rejected", "rejected": "chosen"},
            "'score_rejected' is 5.5 for chosen and 'score_chosen' 8.5 for rejected",
        ),
    ],
)
def test_scores_that_may_say_that_the_rejected_reply_is_better_are_refused(beside, renames, named):
    with pytest.raises(StageError) as caught:
        one_example(PAIR | beside, "preference", renames=renames)
    assert named in str(caught.value)
    assert "comparison (type: scores)" in str(caught.value)
    assert f"put {' and '.join(repr(name) for name in sorted(beside))} into ignore_columns" in str(caught.value)
    assert not isinstance(caught.value, MalformedRowError)  # which could be left out
    assert one_example(PAIR | beside, "preference", facts=beside, renames=renames).facts == beside


@pytest.mark.parametrize(
    ("beside", "renames"),
    [
        ({"score_chosen": 8.5, "score_rejected": 5.5}, {}),
        ({"score_chosen": 8.5, "score_rejected": 8.5}, AB),
        ({"score_chosen": 5.5, "score_rejected": 8.5}, {"chosen": "rejected", "rejected": "chosen"}),
        ({"score_chosen": None, "score_rejected": 8.5}, {}),
        ({"chosen_tokens": 5, "rejected_tokens": 8}, AB),
        ({"score_0": -0.5, "score_1": 0.5}, {}),
        ({"score_0": None, "score_1": ""}, AB),
        ({"model_a": "m1", "model_b": "m2"}, {"a": "chosen", "b": "rejected"}),
        ({"meta": {"lang": "en", "turns": 17}}, AB),
    ],
)
def test_scores_that_agree_and_what_is_no_score_may_stand_there(beside, renames):
    assert one_example(PAIR | beside, "preference", renames=renames)


def test_an_object_that_may_name_the_winner_is_looked_into():
    for renames in (RENAMED, {}):
        with pytest.raises(StageError, match=r"'meta.winner' may say .* put 'meta' into ignore_columns"):
            one_example(PAIR | {"meta": {"winner": "b"}}, "preference", renames=renames)
    with pytest.raises(StageError, match=r"the column 'meta.pick' may say which"):
        one_example(PAIR | {"meta": {"pick": "b"}}, "preference", renames=RENAMED)
    with pytest.raises(StageError, match=r"the column 'meta.winner' may say which"):
        one_example(PAIR, "preference", facts={"meta": {"winner": "b"}}, renames=RENAMED)
    assert one_example(PAIR | {"meta": {"pick": "b"}}, "preference")


def test_the_chosen_conversation_once_more_leaves_no_doubt_of_the_format():
    yes, no = [user("tea"), bot("yes")], [user("tea"), bot("no")]
    row = {
        "prompt": "tea",
        "prompt_id": "7",
        "chosen": yes,
        "rejected": no,
        "messages": yes,
    }  # UltraFeedback, binarized
    row |= {"score_chosen": 8.0, "score_rejected": 3.0}
    assert detect_format(row, "here") == "preference"
    assert said(one_example(row, "preference")) == ([user("tea")], "yes", "no")
    del row["prompt"]
    assert detect_format(row, "here") == "preference_implicit"
    with pytest.raises(StageError, match="preference or messages_preference; name one in format"):
        detect_format(row | {"prompt": "tea", "messages": [user("tea")]}, "here")


def test_a_single_reply_that_was_named_by_hand_beside_a_winner_is_refused():
    row = {"prompt": "tea", "completion": "no", "response_1": "yes", "better_response_id": 1}
    with pytest.raises(StageError, match=r"'better_response_id' may say which of several .* \(type: winner\)"):
        one_example(row, "prompt_completion", renames={"response_0": "completion"})
    assert one_example(row, "prompt_completion")  # named so by the data
    assert one_example(row | {"better_response_id": None}, "prompt_completion", renames={"response_0": "completion"})
    facts = {"better_response_id": 1}
    assert one_example(row, "prompt_completion", facts=facts, renames={"response_0": "completion"}).facts == facts
