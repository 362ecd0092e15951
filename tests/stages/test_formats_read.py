"""The examples of formats, read by the stage: the same rows in the same kinds, and nothing of them unsaid."""

import pytest

from tests.lib.data.reading import options
from tests.lib.data.test_format_examples import ALL
from tests.stages.data_stages import read, settings, sources_of, write_rows


@pytest.mark.parametrize("example", ALL, ids=lambda example: example.what)
def test_an_example_is_read_by_the_stage(tmp_path, example):
    kind = example.kind
    keys = {
        "path": write_rows(tmp_path / "raw.jsonl", example.rows),
        "kinds": [kind, "prompts"] if example.facts and kind != "prompts" else [kind],  # facts ride on prompts
        "columns": example.columns,
        "facts": list(example.facts),
        **options(**example.options).model_dump(mode="json"),
    }
    settings(tmp_path, sources_of(files={"own": keys}))
    rows, metrics, record = read(tmp_path, "own")
    assert [row for row in rows if row["kind"] == kind] == [{"kind": kind, **row} for row in example.becomes]
    assert {name: count for name, count in metrics.items() if name in example.counts} == example.counts
    assert f"format {example.format}: the only one" in record or example.format == "comparison"
    unread = [line for line in record.splitlines() if line.startswith("not read: ")]
    assert unread in ([], ["not read: message_tree_id"], ["not read: labels"])
