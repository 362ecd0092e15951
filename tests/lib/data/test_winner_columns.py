"""No message of ours leads to reversed labels: a column that may say who won is described, or ignored by name."""

import pytest

from stages.lib.command.errors import StageError
from stages.lib.data.detection import detect_format
from stages.lib.data.winner_columns import names_a_winner
from tests.lib.data.reading import one_example, said
from tests.lib.data.test_formats import PAIRS, user

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


@pytest.mark.parametrize("value", [7, 0.5, "A long text", "id-17", [0, "of"], {"a": 1}, "response_2", None, ""])
def test_what_can_be_no_vote_may_stand_there(value):
    assert one_example(PAIR | {"annotation": value}, "preference", renames=RENAMED)


def test_every_message_that_asks_for_columns_to_be_named_speaks_of_comparison():
    two = {"prompt": "tea", "response_0": "yes", "response_1": "no", "better_response_id": 1}
    with pytest.raises(StageError, match=r"say in columns which of yours is which; .* describe that in comparison"):
        detect_format(two, "here")
    with pytest.raises(StageError, match=r"say in columns which of yours is which; .* describe that in comparison"):
        one_example(two, "preference")
