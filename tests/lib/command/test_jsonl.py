"""JSON lines: what is wrong is named by file and line, what is written appears whole."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.lib.command.errors import StageError
from stages.lib.command.jsonl import read_json, read_jsonl, write_json, write_jsonl


def test_rows_come_back_in_their_own_letters(tmp_path: Path) -> None:
    path = tmp_path / "new/rows.jsonl"
    rows = [{"a": "Zürich – 東京"}, {"b": [1, 2.5, None]}, {"c": "two\nlines\u2028here"}]
    assert write_jsonl(path, rows) == 3
    assert list(read_jsonl(path)) == rows
    assert "東京" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": \n', "rows.jsonl, line 2: not valid JSON"),
        ('{"a": 1}\n\n[1]\n', "rows.jsonl, line 3: expected a JSON object, found list"),
        ("", "rows.jsonl is empty"),
        ("\n \n", "rows.jsonl is empty"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(StageError) as error:
        list(read_jsonl(path))
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"rows.jsonl does not exist"):
        list(read_jsonl(tmp_path / "rows.jsonl"))


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])

    def broken() -> Iterator[dict]:
        yield {"a": 2}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(path, broken())
    assert list(read_jsonl(path)) == [{"a": 1}]


def test_json_ends_with_a_newline_and_keeps_its_order(tmp_path: Path) -> None:
    write_json(tmp_path / "m.json", {"b": 1, "a": 2})
    assert (tmp_path / "m.json").read_text() == '{\n  "b": 1,\n  "a": 2\n}\n'


def test_a_line_that_is_no_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(StageError, match=r"rows.jsonl, line 2: not UTF-8 text"):
        list(read_jsonl(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "a": \n}', "values.json, line 3: not valid JSON"),
        ("[" * 100_000, "values.json: not usable JSON (brackets nested too deeply)"),
        ("1" * 5000, "values.json: not usable JSON"),
    ],
)
def test_a_json_file_that_cannot_be_read_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "values.json").write_text(text)
    with pytest.raises(StageError, match=re.escape(message)):
        read_json(tmp_path / "values.json")


def test_a_json_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "values.json").write_bytes(b'"\xff"')
    with pytest.raises(StageError, match=r"values\.json: not UTF-8 text"):
        read_json(tmp_path / "values.json")
