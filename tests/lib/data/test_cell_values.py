"""Lists and dictionaries in a cell of a table: JSON, or what Python prints, and nothing that says two things."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.data import cell_values
from stages.lib.data.cell_values import value_in_cell
from stages.lib.data.row_errors import MalformedRowError

NUMBERS = st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(VALUES) | st.dictionaries(st.text(), VALUES))
def test_what_python_prints_and_what_json_writes_is_read_back(value):
    assert value_in_cell(repr(value), "here") == value
    assert value_in_cell(json.dumps(value), "here") == value
    assert value_in_cell(json.dumps(value, ensure_ascii=False), "here") == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hello", "not valid JSON"),
        ("['a' 'b']", "two texts without a comma between them, as NumPy prints a list"),
        ("[['a'\n 'b']]", "two texts without a comma between them"),
        ("['''a''']", "two texts without a comma"),
        ("['a'\n'b']", "two texts without a comma"),
        ("['a' \"b\"]", "two texts without a comma"),
        ("[{'a': 1}\n {'a': 2}]", "not valid JSON"),
        ("array(['a'], dtype=object)", "not valid JSON"),
        ("[array(['a'], dtype=object)]", "a Python call is no JSON value"),
        ("{'a', 'b'}", "a Python set is no JSON value"),
        ("[('a', 'b')]", "a Python tuple is no JSON value"),
        ("[b'a']", "a Python constant is no JSON value"),
        ("[1j]", "a Python constant is no JSON value"),
        ("[...]", "a Python constant is no JSON value"),
        ("[nan]", "a Python name is no JSON value"),
        ("['a', 1e999]", "a number larger than any float64"),
        ("{1: 'a'}", "a dictionary whose keys are not all texts"),
        ("{**{'a': 1}}", "a dictionary whose keys are not all texts"),
        ("{'a': 1, 'a': 2}", "a key stands twice"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ("[__import__('os').getcwd()]", "a Python call is no JSON value"),
        ("[x for x in 'ab']", "a Python listcomp is no JSON value"),
        ("[f'{1}']", "a Python joinedstr is no JSON value"),
        ("[-'a']", "a Python unaryop is no JSON value"),
        (r"['\d']", "not valid JSON"),
        ("[" * 100_000, "not usable JSON"),
        ("['" + "[" * 100_000, "not valid JSON"),
        ("[" + "-" * 100_000 + "1]", "not valid JSON"),
        ("['a", "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_anything_else_is_refused(text, reason):
    with pytest.raises(MalformedRowError) as caught:
        value_in_cell(text, "here")
    assert str(caught.value).startswith("here: not ")
    assert reason in str(caught.value)
    assert caught.value.reason == "unreadable_cell"


def test_a_literal_is_bounded_and_json_is_not(monkeypatch):
    monkeypatch.setattr(cell_values, "LONGEST_LITERAL", 100)
    long = ["a" * 200]
    assert value_in_cell(json.dumps(long), "here") == long
    with pytest.raises(MalformedRowError, match="which is read up to 100 characters; write JSON"):
        value_in_cell(repr(long), "here")
