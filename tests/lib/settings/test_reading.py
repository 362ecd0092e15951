"""How raw rows are read: what the settings refuse, and how a vote is compared."""

import pytest

from stages.lib.command.errors import StageError
from stages.lib.command.params import build
from stages.lib.settings.declaration import block
from stages.lib.settings.reading import ReadingOptions, Threshold, in_a_cell
from tests.lib.data.reading import COMPARISONS, one_example, options, read
from tests.lib.data.test_formats import bot, hh, user


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_template": "no place"}, "must hold exactly one {}"),
        ({"input_template": "{} and {}"}, "must hold exactly one {}"),
        ({"input_template": "{prompt}"}, "must hold exactly one {}"),
        ({"input_template": "{0}"}, "must hold exactly one {}"),
        ({"input_template": "{!r}"}, "must hold exactly one {}"),
        ({"input_template": "{:>9}"}, "must hold exactly one {}"),
        ({"input_template": "{} {"}, "stand for braces"),
        ({"input_template": "User: {}\\nAssistant:"}, "holds a backslash and an n"),
        ({"comparison": {"type": "winner", "responses": ["a", "b", "c"]}}, "responses must name two columns"),
        ({"comparison": {"type": "winner", "winner": []}}, "winner must name each column"),
        ({"comparison": {"type": "winner", "first": []}}, "an index may count from 0 or from 1"),
        ({"comparison": {"type": "winner", "names": ["a", "b"]}}, "first and second [] beside them"),
        ({"comparison": {"type": "winner", "first": [1], "second": ["1"]}}, "must hold different values"),
        ({"comparison": {"type": "winner", "tie": [0]}}, "must hold different values"),
        ({"comparison": {"type": "scores", "responses": []}}, "responses must name at least one column"),
        ({"comparison": {"type": "scores", "scores": []}}, "name one"),
        ({"comparison": {"type": "scores", "score_key": "s"}}, "name one"),
        ({"comparison": {"type": "scores", "scores": [], "score_key": "s"}}, "text_key must name the text"),
        ({"comparison": {"type": "scores", "responses": ["a", "b"]}}, "as many columns as responses"),
        (
            {"comparison": {"type": "scores", "scores": ["rank"]}},
            "best must say which 'rank' is the best: lowest where 1",
        ),
        ({"comparison": {"type": "scores", "scores": ["humanRanks"]}}, "best must say which 'humanRanks' is the best"),
        (
            {"comparison": {"type": "scores", "scores": [], "score_key": "gpt4_rank", "text_key": "t"}},
            "best must say which 'gpt4_rank' is the best",
        ),
        ({"comparison": {"type": "order", "responses": []}}, "responses must name at least one column"),
        ({"comparison": {"type": "tree", "id_key": "id"}}, "id_key and parent_key go together"),
        ({"comparison": {"type": "tree", "id_key": "id", "parent_key": "p"}}, "root must be null with id_key"),
        ({"threshold": {"good_from": 1.0, "bad_below": 2.0}}, "bad_below must be at most good_from"),
        ({"threshold": {"score": None}}, "threshold.score must be a column"),
        ({"threshold": {}, "comparison": {"type": "scores"}}, "threshold.score must be a column, and null"),
        (
            {"threshold": {"score": None}, "comparison": {"type": "scores", "best": "lowest"}},
            "threshold makes no pairs",
        ),
        (
            {"threshold": {"score": None}, "comparison": {"type": "scores", "least_gap": 1.0}},
            "threshold makes no pairs",
        ),
        ({"threshold": {"score": None}, "comparison": {"type": "order"}}, "threshold is for scores"),
    ],
)
def test_what_does_not_hold_together_is_one_line(given, message):
    values = dict(given)
    if "comparison" in values:
        values["comparison"] = block(COMPARISONS[values["comparison"]["type"]], **values["comparison"])
    if "threshold" in values:
        values["threshold"] = block(Threshold, **values["threshold"])
    with pytest.raises(StageError) as caught:
        build(ReadingOptions, block(ReadingOptions, **values), "params.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", COMPARISONS)
def test_the_defaults_of_every_comparison_hold_together(kind):
    assert options(comparison={"type": kind}).comparison.type == kind


@pytest.mark.parametrize(("best", "better"), [("lowest", "first"), ("highest", "second")])
def test_ranks_are_read_as_best_says(best, better):
    row = {"prompt": "tea", "responses": ["first", "second"], "rank": [1, 2]}
    comparison = {"type": "scores", "scores": ["rank"], "best": best}
    assert one_example(row, "comparison", comparison=comparison).reply == bot(better)
    frank = {"prompt": "tea", "responses": ["first", "second"], "frank": [1, 2]}
    comparison = {"type": "scores", "scores": ["frank"]}  # is no rank, and scores are best where they are highest
    assert one_example(frank, "comparison", comparison=comparison).reply == bot("second")


def test_a_vote_is_compared_as_it_is_meant():
    for alike in ((0, "0", 0.0, "0.0", " 0 "), (True, "True", "true"), ("A", " A "), (-1, "-1", -1.0, "-1.00")):
        assert len({in_a_cell(value) for value in alike}) == 1
    different = (0, 1, True, False, "A", "B", "a", 0.5, "0.5.0", "v1.0", "", "1.", -1, "TRUE")
    assert len({in_a_cell(value) for value in different}) == len(different) - 1  # "1." is 1


def test_a_template_goes_around_prompts_that_are_texts():
    template = "Q {{x}}: {}\nA:"
    for row, name in [
        ({"prompt": "tea {y}"}, "prompt"),
        ({"prompt": "tea {y}", "completion": "yes"}, "prompt_completion"),
        ({"instruction": "tea {y}", "output": "yes"}, "alpaca"),
        ({"question": "tea {y}", "answer": "yes"}, "question_answer"),
        ({"chosen": "tea {y} yes", "rejected": "tea {y} no"}, "preference_implicit"),
    ]:
        assert one_example(row, name, input_template=template).prompt == [user("Q {x}: tea {y}\nA:")]
    assert one_example({"text": "tea"}, "text", input_template=template).text == "Q {x}: tea\nA:"
    with_input = {"instruction": "tea", "input": "milk", "output": "yes"}
    assert one_example(with_input, "alpaca", input_template="{}!").prompt == [user("tea\n\nmilk!")]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": [user("tea")]}, "prompt"),
        ({"prompt": hh("tea", "")}, "prompt"),
        ({"messages": [user("tea")], "chosen": "a", "rejected": "b"}, "messages_preference"),
        ({"chosen": hh("tea", "a"), "rejected": hh("tea", "b")}, "hh"),
        ({"messages": [user("tea"), bot("a")]}, "messages"),
        ({"conversations": [{"from": "human", "value": "tea"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
        ({"chosen": [user("tea"), bot("a")], "rejected": [user("tea"), bot("b")]}, "preference_implicit"),
    ],
)
def test_a_template_that_nothing_would_obey_is_refused(row, name):
    with pytest.raises(StageError, match="input_template is for prompts that are texts"):
        read(row, name, input_template="{}!")
