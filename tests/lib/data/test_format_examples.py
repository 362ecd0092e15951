"""Each example of a format, read: what its row becomes, what is counted, and that it is detected."""

from collections import Counter
from typing import get_args

import pytest

from stages.lib.command.errors import StageError
from stages.lib.data.detection import FormatOfRows
from stages.lib.data.formats import Format, columns_read, examples_of
from stages.lib.data.message_cells import with_messages_read
from stages.lib.data.raw_columns import RawColumns
from stages.lib.data.readers.reply_trees import trees_of_rows
from stages.lib.data.row_errors import UnusableRowError
from stages.lib.settings.prepare_base import EOS_TOKEN
from tests.lib.data.format_examples import EXAMPLES
from tests.lib.data.format_table import PAGE, page, shortened
from tests.lib.data.reading import options
from tests.lib.data.trained_texts import trained_texts

REPLIES = ("chosen", "rejected", "completion")
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
    said = {name: getattr(example, name) for name in ("margin", "score", "facts", "tools", "template_arguments")}
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


@pytest.mark.parametrize("example", ALL, ids=lambda example: example.what)
def test_what_is_trained_of_an_example(example):
    """Of a plain template each reply as it stands, and EOS."""
    for row in example.becomes:
        if "tools" in row:
            with pytest.raises(StageError, match="the chat template refuses these messages: unknown role 'tool'"):
                trained_texts(example.kind, row)
        elif "text" in row:
            assert trained_texts(example.kind, row) == [("trained", f"{row['text'][1:]}{EOS_TOKEN}")]
        elif example.kind == "sft":
            replies = [one for one in row["messages"] if one["role"] == "assistant" and one.get("weight", 1)]
            trained = [("trained", one["content"] + EOS_TOKEN) for one in replies]
            assert trained_texts(example.kind, row) == trained
        elif example.kind == "prompts":
            ((_, prompt),) = trained_texts(example.kind, row)
            assert prompt.endswith(f"<|user|>{row['prompt'][-1]['content']}<|assistant|>")
        else:
            trained = [(sort, row[sort][0]["content"] + EOS_TOKEN) for sort in REPLIES if sort in row]
            assert trained_texts(example.kind, row) == trained


def test_of_a_long_prompt_the_page_shows_the_end():
    assert shortened("prompts", "a" * 50 + "b" * 50) == "…" + "a" * 30 + "b" * 50
    assert shortened("sft", "a" * 50 + "b" * 50) == "a" * 50 + "b" * 30 + "…"


def test_there_is_an_example_of_every_format_and_of_every_comparison():
    assert {example.format for example in ALL} == set(get_args(Format))
    compared = {example.options["comparison"]["type"] for example in ALL if "comparison" in example.options}
    assert compared == {"winner", "scores", "order", "tree"}


def test_the_page_of_formats_is_that_of_the_examples():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.lib.data.format_table --write"
