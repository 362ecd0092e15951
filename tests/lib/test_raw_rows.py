import csv
import gzip
import json

import pytest

from stages.lib.errors import StageError
from stages.lib.raw_rows import local_rows

ROWS = [{"prompt": 'é, "a"\nb', "chosen": "yes"}, {"prompt": "c", "chosen": "no"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_rows(path):
    """The same two rows in the type that the name of the file says."""
    if path.name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif ".csv" in path.name:
        opener = gzip.open if path.name.endswith(".gz") else open
        with opener(path, "wt", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, ["prompt", "chosen"])
            table.writeheader()
            table.writerows(ROWS)
    else:
        text = LINES if ".jsonl" in path.name else json.dumps(ROWS, indent=1)
        write(path, gzip.compress(text.encode(), mtime=0) if path.name.endswith(".gz") else text)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "parquet"])
def test_every_type_of_file_gives_the_same_rows(tmp_path, suffix):
    file = write_rows(tmp_path / f"a.{suffix}")
    assert [row for _, row in local_rows(file)] == ROWS


def test_rows_are_named_by_line_or_row(tmp_path):
    lines = write(tmp_path / "a.jsonl", "\n" + LINES)
    assert [where for where, _ in local_rows(lines)] == [f"{lines}, line 2", f"{lines}, line 3"]
    array = write_rows(tmp_path / "a.json")
    assert [where for where, _ in local_rows(array)] == [f"{array}, row 1", f"{array}, row 2"]


def test_json_lines_under_the_name_of_an_array_are_read(tmp_path):
    assert [row for _, row in local_rows(write(tmp_path / "a.json", b"\xef\xbb\xbf" + LINES.encode()))] == ROWS


def test_a_folder_is_read_in_the_order_of_its_names_without_its_documents(tmp_path):
    for name in ("b/train.jsonl", "a/test.jsonl", "c.jsonl"):
        write(tmp_path / name, json.dumps({"file": name}) + "\n")
    for name in ("README.md", "LICENSE", "b/NOTE.md", ".gitignore", ".cache/x.jsonl", "README.upstream.md"):
        write(tmp_path / name, "words")
    assert [row["file"] for _, row in local_rows(tmp_path)] == ["a/test.jsonl", "b/train.jsonl", "c.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINES + "{oops\n", "a.jsonl, line 3: not valid JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: expected a JSON object, found list"),
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.jsonl", " \n\n", "a.jsonl is empty"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "a.jsonl, line 2: not UTF-8"),
        ("a.csv.gz", gzip.compress(b"a,b\n1,2\n3,\xff\n", mtime=0), "a.csv.gz, line 3: not UTF-8"),
        ("a.jsonl.gz", LINES, "a.jsonl.gz: not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "a.jsonl.gz: not a whole gzip file"),
        ("a.json", "[]", "a.json is empty"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', "a.json, line 2: not valid JSON"),
        ("a.json", '[{"a": 1}, 2]', "a.json, row 2: expected a JSON object, found int"),
        ("a.json", "3", "a.json: expected an array of objects, found int"),
        ("a.csv", "a,b\n1,2\n3\n", "a.csv, line 3: expected 2 fields"),
        ("a.csv", "a,b\n1,2,3\n", "a.csv, line 2: expected 2 fields"),
        ("a.csv", "a,b\n", "a.csv is empty"),
        ("a.csv", 'a,b\n"1"x,2\n', "a.csv, line 2: not valid CSV"),
        ("a.parquet", "words", "a.parquet: not a Parquet file"),
        ("a.txt", "words", "a.txt: no data file that can be read here, expected one of .jsonl"),
    ],
)
def test_a_bad_file_is_an_error_that_says_where(tmp_path, name, content, message):
    write(tmp_path / name, content)
    with pytest.raises(StageError) as caught:
        list(local_rows(tmp_path / name))
    assert message in str(caught.value)


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(StageError, match="missing does not exist"):
        list(local_rows(tmp_path / "missing"))
    write(tmp_path / "LICENSE", "words")
    with pytest.raises(StageError, match="holds no data file"):
        list(local_rows(tmp_path))
