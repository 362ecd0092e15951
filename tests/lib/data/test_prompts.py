"""Prompts as a token table holds them: what goes in comes out, and what is no message or fact is refused by place."""

import json

import pytest

from stages.lib.command.errors import StageError
from stages.lib.data.prompts import Prompt, facts_from, facts_in, json_text, messages_in_cell, prompts_of

MESSAGES = [{"role": "system", "content": "Füße \u2028"}, {"role": "user", "content": 'a "b"\n'}]
FACTS = {"task": "sums", "answer": 0.1, "deep": [{"z": None, "a": True}]}


def test_a_row_of_the_table_is_a_whole_prompt():
    columns = {
        "row": [3, 5],
        "prompt_ids": [[1, 2], [7]],
        "messages": [json_text(MESSAGES), json_text(MESSAGES[1:])],
        "facts": [json_text(FACTS), "{}"],
        "context": ["{}", json_text({"tools": [{"name": "add"}]})],
        "source": ["films", "sums"],
    }
    prompts = prompts_of(columns)
    assert prompts == [
        Prompt(3, [1, 2], MESSAGES, FACTS, {}, "films"),
        Prompt(5, [7], MESSAGES[1:], {}, {"tools": [{"name": "add"}]}, "sums"),
    ]
    assert [list(message) for message in prompts[0].messages] == [["role", "content"]] * 2  # as samples show them


def test_equal_values_have_equal_bytes():
    assert json_text({"b": 1, "a": {"d": "ü", "c": []}}) == '{"a": {"c": [], "d": "ü"}, "b": 1}'
    assert json_text(dict(reversed(FACTS.items()))) == json_text(FACTS)


SURROGATE = json.dumps("\ud800")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("3", "expected a list of messages, found int"),
        ('["a"]', "message 1: expected a message with 'role' and 'content', found str"),
        ('[{"role": "user"}]', "message 1: expected a message with 'role' and 'content', found keys role"),
        ('[{"role": "judge", "content": "a"}]', "unknown role 'judge'"),
        ('[{"role": "user", "content": 3}]', "'content': expected text, found int"),
        (f'[{{"role": "user", "content": {SURROGATE}}}]', "half a surrogate pair"),
        ("[" * 100_000, "brackets nested too deeply"),
    ],
)
def test_a_cell_without_messages_is_refused(text, message):
    with pytest.raises(StageError) as refused:
        messages_in_cell(text, "t.arrow, row 4, messages")
    assert str(refused.value).startswith("t.arrow, row 4, messages")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{} {}", "not valid JSON"),
        ("[]", "expected an object, found list"),
        ("null", "expected an object, found NoneType"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": [1e999]}', "a number is larger than any float64"),
        (f'{{"a": {SURROGATE}}}', "half a surrogate pair"),
        (f'{{{SURROGATE}: "a"}}', "half a surrogate pair"),
        ('{"a":' * 100_000, "brackets nested too deeply"),
    ],
)
def test_a_cell_without_facts_is_refused(text, message):
    with pytest.raises(StageError) as refused:
        facts_in(text, "t.arrow, row 4, facts")
    assert str(refused.value).startswith("t.arrow, row 4, facts")
    assert message in str(refused.value)


def test_facts_too_deep_to_be_written_are_refused():
    deep = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(StageError, match=r"^here: brackets are nested too deeply"):
        facts_from(deep, "here")
