"""Columns of raw rows: renamed, ignored by name, read, and what nothing reads is told."""

import pytest

from stages.lib.command.errors import StageError
from stages.lib.data.conversations import MalformedRowError
from stages.lib.data.detection import columns_of
from stages.lib.data.raw_columns import MEANINGFUL_COLUMNS, MEANINGFUL_KEYS, RawColumns, refuse_unknown_targets
from tests.lib.data.reading import one_example, options
from tests.lib.data.test_formats import bot, user

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def test_columns_are_renamed_and_may_change_places():
    row = {"chosen": "worse", "rejected": "better", "query": "a", "id": 5}
    columns = RawColumns({"chosen": "rejected", "rejected": "chosen", "query": "prompt"}, ("id",))
    assert columns.take(row, "here")[0] == {"chosen": "better", "rejected": "worse", "prompt": "a"}


def test_a_column_to_rename_must_be_there_unless_rows_may_lack_it():
    columns = RawColumns({"query": "prompt", "strength": "margin"}, ())
    assert columns.take({"query": "a"}, "here")[0] == {"prompt": "a"}
    with pytest.raises(MalformedRowError, match="here: no column 'query' to rename, found question") as caught:
        columns.take({"question": "a"}, "here")
    assert caught.value.reason == "missing_column"


def test_a_name_with_dots_leads_into_objects():
    row = {"question": {"text": "a", "of": {"id": 5, "at": 6}}, "answer": "b", "a.b": 1}
    columns = RawColumns({"question.text": "prompt"}, ("a.b",), ("question.of.id",))
    taken, facts = columns.take(row, "here")
    assert taken == {"prompt": "a", "question.of.at": 6, "answer": "b"}
    assert facts == {"question.of.id": 5}
    assert columns.own == {"question.text", "question.of.id", "question.of.at", "answer", "a.b"}
    columns.refuse_unseen()
    with pytest.raises(MalformedRowError, match=r"here: no column 'question.text' to rename, found question, answer"):
        columns.take({"question": "a", "answer": "b"}, "here")
    assert RawColumns({"a.b": "prompt"}).take({"a.b": 1, "a": {"b": 2}}, "here")[0] == {"prompt": 1, "a": {"b": 2}}


def test_no_column_takes_the_place_of_another():
    row = {"query": "new", "prompt": "old"}
    with pytest.raises(StageError, match=r"here: by sources.columns two columns are named 'prompt'"):
        RawColumns({"query": "prompt"}, ()).take(row, "here")
    assert RawColumns({"query": "prompt"}, ("prompt",)).take(row, "here")[0] == {"prompt": "new"}


@pytest.mark.parametrize("column", sorted(MEANINGFUL_COLUMNS - set(columns_of("preference"))))
def test_a_column_with_a_meaning_that_nothing_reads_is_refused_until_it_is_ignored(column):
    row = PAIR | {column: [1]}
    with pytest.raises(StageError, match=f"here: the column '{column}' .*ignore_columns"):
        RawColumns({}, ()).refuse_unread(row, "preference", "here")
    for nothing in (None, "", " ", [], {}):
        RawColumns({}, ()).refuse_unread(PAIR | {column: nothing}, "preference", "here")
    assert RawColumns({}, (column,)).take(row, "here")[0] == PAIR


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("hh", "history"),
        ("hh", "input"),
        ("messages", "history"),
        ("messages", "margin"),
        ("alpaca", "margin"),
        ("sharegpt", "input"),
        ("sharegpt_preference", "history"),
        ("preference_implicit", "input"),
    ],
)
def test_a_column_that_another_format_reads_is_refused_in_one_that_does_not(name, column):
    with pytest.raises(StageError, match=f"here: the column '{column}' \\(format '{name}'\\)"):
        RawColumns({}, ()).refuse_unread({column: 0}, name, "here")


@pytest.mark.parametrize(
    ("name", "column", "advice"),
    [
        (
            "messages",
            "kto_tag",
            "columns: {kto_tag: label} reads it as the label that tells good replies from bad ones",
        ),
        ("alpaca", "score", "threshold (score: score) makes of it the label that tells good replies from bad ones"),
        ("prompt_completion", "rating", "threshold (score: rating) makes of it the label"),
        ("preference", "label", "if it says which of the two replies is better, describe it in comparison"),
        ("hh", "rating", "if it says which of the two replies is better, describe it in comparison"),
    ],
)
def test_a_column_that_judges_replies_is_to_be_read_before_it_is_to_be_ignored(name, column, advice):
    with pytest.raises(StageError) as caught:
        RawColumns({}).refuse_unread({column: 1}, name, "here")
    assert 0 < str(caught.value).find(advice) < str(caught.value).find("ignore_columns")


def test_a_tag_that_columns_names_label_is_read_as_one():
    columns = RawColumns({"kto_tag": "label"})
    row, _ = columns.take({"messages": [user("a"), bot("b")], "kto_tag": False}, "here")
    columns.refuse_unread(row, "messages", "here")
    assert one_example(row, "messages").label is False


@pytest.mark.parametrize("key", sorted(MEANINGFUL_KEYS))
def test_a_key_of_a_message_that_nothing_reads_is_refused_until_it_is_ignored(key):
    message = {"role": "user", "content": "a", key: 0}
    for row, name in (({"messages": [{}, message]}, "messages"), (PAIR | {"chosen": [{}, message]}, "preference")):
        with pytest.raises(StageError, match=f"message 2: the key '{key}' .*ignore_columns"):
            RawColumns({}, ()).refuse_unread(row, name, "here")
        RawColumns({}, (key,)).refuse_unread(row, name, "here")
    RawColumns({}, ()).refuse_unread({"messages": [message | {key: None}]}, "messages", "here")
    single = {"conversations": [], "chosen": {"from": "gpt", "value": "a", key: "b"}, "rejected": {}}
    with pytest.raises(StageError, match=f"here, 'chosen', message 1: the key '{key}'"):
        RawColumns({}, ()).refuse_unread(single, "sharegpt_preference", "here")


def test_messages_are_looked_through_wherever_they_are_read():
    message = {"role": "assistant", "content": "a", "loss": False, "id": 1}
    compared = options(comparison={"type": "winner", "responses": ["a", "b"], "winner": ["won"]})
    for row, name, reading, where in [
        ({"input": {"messages": [message]}}, "openai_preference", options(), "'input', message 1"),
        ({"preferred_output": [message]}, "openai_preference", options(), "'preferred_output', message 1"),
        ({"answer": [message], "question": "q"}, "question_answer", options(), "'answer', message 1"),
        ({"a": "x", "b": [{"role": "user"}, message]}, "comparison", compared, "'b', message 2"),
    ]:
        with pytest.raises(StageError, match=f"here, {where}: the key 'loss'"):
            RawColumns({}, options=reading).refuse_unread(row, name, "here")
        columns = RawColumns({}, ("loss",), options=reading)
        columns.refuse_unread(row, name, "here")
        assert "id" in columns.keys
    tools = RawColumns({})
    tools.refuse_unread({"messages": [], "tools": [{"name": "f", "loss": 1}]}, "messages", "here")
    assert tools.keys == set()


@pytest.mark.parametrize(
    ("renames", "ignored", "message"),
    [
        ({}, ("scores",), "sources.ignore_columns names 'scores', which no row has; did you mean 'score'"),
        ({}, ("wheight",), "sources.ignore_columns names 'wheight', which no row has; did you mean 'weight'"),
        ({"sytem": "system"}, (), "sources.columns names 'sytem', which no row has; did you mean 'system'"),
    ],
)
def test_a_name_that_no_row_has_is_an_error(renames, ignored, message):
    columns = RawColumns(renames, ignored)
    row = {"messages": [{"role": "user", "content": "a", "weight": None}], "score": 1, "system": "b"}
    columns.refuse_unread(columns.take(row, "here")[0] | {"score": None}, "messages", "here")
    with pytest.raises(StageError) as caught:
        columns.refuse_unseen()
    assert message in str(caught.value)


def test_what_is_read_and_what_is_not_is_told_line_by_line():
    columns = RawColumns({"query": "prompt"}, ("score", "weight"))
    message = {"role": "assistant", "content": "a", "weight": 1, "id": 2}
    row = {"query": "a", "chosen": [message], "rejected": "c", "score": 1, "at\nnight": 5, "half \ud83d": 1}
    columns.refuse_unread(columns.take(row, "here")[0], "preference", "here")
    columns.refuse_unseen()
    assert columns.summary("preference") == [
        "columns read: chosen, prompt (from query), rejected",
        "not read: at\\nnight, half \\ud83d",
        "ignored by name: score, weight",
        "keys of messages not read: id",
    ]


def test_columns_of_facts_are_taken_and_read_no_more_unless_a_format_may_read_them():
    columns = RawColumns({"q": "prompt"}, (), ("id", "label", "q"))
    row = {"q": "a", "completion": "b", "label": True, "id": 3}
    taken, facts = columns.take(row, "here")
    assert taken == {"prompt": "a", "completion": "b", "label": True}
    assert facts == {"id": 3, "label": True, "q": "a"}
    with pytest.raises(MalformedRowError, match="here: no column 'id' for facts, found q"):
        columns.take({"q": "a"}, "here")


def test_a_column_with_a_meaning_may_be_a_fact():
    RawColumns({}, (), ("score",)).refuse_unread(PAIR | {"score": 1}, "preference", "here")
    with pytest.raises(StageError, match="the column 'score'"):
        RawColumns({}, (), ("id",)).refuse_unread(PAIR | {"score": 1}, "preference", "here")


@pytest.mark.parametrize("target", ["promt", "", "reward", "role"])
def test_a_column_can_only_get_a_name_that_a_format_reads(target):
    with pytest.raises(ValueError, match=f"columns gives 'x' the name '{target}', which no format reads"):
        refuse_unknown_targets({"x": target})
