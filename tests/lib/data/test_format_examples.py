"""Each example of a format, read: what its row becomes, what is counted, and that it is detected."""

from collections import Counter
from typing import get_args

import pytest

from stages.lib.data.detection import FormatOfRows
from stages.lib.data.formats import Format, columns_read, examples_of
from stages.lib.data.message_cells import with_messages_read
from stages.lib.data.raw_columns import RawColumns
from stages.lib.data.readers.reply_trees import trees_of_rows
from stages.lib.data.row_errors import UnusableRowError
from tests.lib.data.format_examples import EXAMPLES
from tests.lib.data.format_table import PAGE, page
from tests.lib.data.reading import options

ALL = [example for examples in EXAMPLES.values() for example in examples]


def prepared(example):
    """The prepared row of an example's own kind."""
    replies = {"prompt": example.prompt}
    if example.text is not None:
        replies = {"text": example.text}
    elif example.rejected is not None:
        replies |= {"chosen": [example.reply], "rejected": [example.rejected]}
    elif example.label is not None:
        replies |= {"completion": [example.reply], "label": example.label}
    elif example.reply is not None:
        replies = {"messages": [*example.prompt, example.reply]}
    said = {name: getattr(example, name) for name in ("margin", "facts", "tools", "template_arguments")}
    return replies | {name: value for name, value in said.items() if value is not None and value != {}}


@pytest.mark.parametrize("example", ALL, ids=lambda example: example.what)
def test_what_the_rows_of_an_example_become(example):
    settings, counts, made = options(**example.options), Counter(), []
    rows = [("here", row) for row in example.rows]
    if example.options.get("comparison", {}).get("id_key"):
        rows = [*trees_of_rows(rows, settings.comparison)]
    formats = FormatOfRows("auto", settings, example.facts)
    columns = RawColumns(example.columns, (), example.facts, settings)
    for where, raw in rows:
        taken, facts = columns.take(raw, where)
        row = with_messages_read(taken, where)
        name = formats.of(row, where)
        columns.refuse_unread(row, name, where)
        try:
            made += examples_of(row, name, settings, where, facts=facts, renames=example.columns, counts=counts)
        except UnusableRowError as error:
            counts[f"dropped/{error}"] += 1
    assert formats.name == example.format
    assert [prepared(example) for example in made] == example.becomes
    assert +counts == example.counts
    unread = columns.ours - columns_read(example.format, settings) - {*example.facts}
    assert unread <= {"message_tree_id", "labels"}


def test_there_is_an_example_of_every_format_and_of_every_comparison():
    assert {example.format for example in ALL} == set(get_args(Format))
    compared = {example.options["comparison"]["type"] for example in ALL if "comparison" in example.options}
    assert compared == {"winner", "scores", "order", "tree"}


def test_the_page_of_formats_is_that_of_the_examples():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.lib.data.format_table --write"
