import contextlib
import csv
import datetime
import gzip
import json
import os
import socket
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from stages.lib.command.errors import StageError
from stages.lib.data.hub_data import HubData, hub_rows
from stages.lib.data.raw_rows import FileOptions, local_rows

ROWS = [{"prompt": 'é, "a"\nb', "chosen": "yes"}, {"prompt": "c", "chosen": "no"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_rows(path):
    """The same two rows in the type that the name of the file says."""
    if path.name.endswith(".parquet"):
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
    assert [row for _, row in local_rows(file, FileOptions())] == ROWS


def test_rows_are_named_by_line_or_row(tmp_path):
    lines = write(tmp_path / "a.jsonl", "\n" + LINES)
    assert [where for where, _ in local_rows(lines, FileOptions())] == [f"{lines}, line 2", f"{lines}, line 3"]
    array = write_rows(tmp_path / "a.json")
    assert [where for where, _ in local_rows(array, FileOptions())] == [f"{array}, row 1", f"{array}, row 2"]


def test_json_lines_under_the_name_of_an_array_are_read(tmp_path):
    assert rows_of(write(tmp_path / "a.json", b"\xef\xbb\xbf" + LINES.encode())) == ROWS


def test_a_folder_is_read_in_the_order_of_its_names_without_its_documents(tmp_path, capsys):
    for name in ("b/train.jsonl", "a/test.jsonl", "c.jsonl"):
        write(tmp_path / name, json.dumps({"file": name}) + "\n")
    for name in ("README.md", "LICENSE", "b/NOTE.md", ".gitignore", ".cache/x.jsonl", "README.upstream.md"):
        write(tmp_path / name, "words")
    assert [row["file"] for _, row in local_rows(tmp_path, FileOptions())] == [
        "a/test.jsonl",
        "b/train.jsonl",
        "c.jsonl",
    ]
    names = ".cache, .gitignore, LICENSE, README.md, README.upstream.md, b/NOTE.md"
    assert capsys.readouterr().out == f"{tmp_path}: documents and hidden files are not read: {names}\n"


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
        ("a.parquet", "", "a.parquet: not a Parquet file"),
        ("a.parquet", b"PAR1" + b"\0" * 40 + b"PARE", "a.parquet: not a Parquet file"),
        (
            "a.jsonl",
            '{"a": 1, "b": 2}\n{"a": 1, "b": 2, "a": 3}\n',
            "a.jsonl, line 2: not usable JSON (the key 'a' stands",
        ),
        ("a.jsonl", '{"a": [{"b": {"c": 1, "c": 1}}]}\n', "a.jsonl, line 1: not usable JSON (the key 'c' stands twice"),
        ("a.json", '[{"a": 1},\n{"b": 2, "b": 2}]', "a.json: not usable JSON (the key 'b' stands twice"),
        ("a.csv", "a,b,a\n1,2,3\n", "a.csv, line 1: the column 'a' stands twice"),
        ("a.jsonl", f'{{"a": {"9" * 4301}}}\n', "a.jsonl, line 1: not usable JSON (an integer of more digits"),
        ("a.json", f'[{{"a": {"9" * 4301}}}]', "a.json: not usable JSON (an integer of more digits"),
        ("a.jsonl", '{"a": ' + "[" * 100_000 + "\n", "a.jsonl, line 1: not usable JSON (brackets"),
        ("a.json", "[" * 100_000, "a.json: not usable JSON (brackets"),
        ("a.jsonl", '{"a": NaN}\n', "a.jsonl, line 1: not usable JSON (NaN is not a JSON number"),
        ("a.json", '[{"a": -Infinity}]', "a.json: not usable JSON (-Infinity is not a JSON number"),
        ("a.jsonl", LINES + "\ufeff" + LINES, "a.jsonl, line 3: not valid JSON (Unexpected UTF-8 BOM"),
        (
            "a.jsonl",
            LINES.encode("utf-16"),
            "a.jsonl, line 1: not UTF-8 text (invalid start byte); it looks like UTF-16",
        ),
        ("a.csv", "a,b\n".encode("utf-16"), "a.csv, line 1: not UTF-8 text (invalid start byte); it looks like UTF-16"),
        (
            "a.json",
            gzip.compress(b"[]", mtime=0),
            "a.json, line 1: not UTF-8 text (invalid start byte); it looks gzipped",
        ),
        ("a.csv", 'a,b\n"1,2\n3,4\n', "a.csv, line 3: not valid CSV (unexpected end of data)"),
        ("a\nb.jsonl", "{", "a\nb.jsonl, line 1: not valid JSON"),
        ("a.txt", "words", "a.txt: not a data file that can be read here, expected one of .jsonl"),
    ],
)
def test_a_bad_file_is_an_error_that_says_where(tmp_path, name, content, message):
    write(tmp_path / name, content)
    with pytest.raises(StageError) as caught:
        list(local_rows(tmp_path / name, FileOptions()))
    assert message in str(caught.value)


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(StageError, match="missing does not exist"):
        list(local_rows(tmp_path / "missing", FileOptions()))
    write(tmp_path / "LICENSE", "words")
    with pytest.raises(StageError, match="holds no data file"):
        list(local_rows(tmp_path, FileOptions()))


def test_a_value_of_any_length_and_a_character_of_any_kind_is_read_from_csv(tmp_path):
    long = "x" * 1_000_000
    file = write(tmp_path / "a.CSV", f'"a\nb",c\n{long},"\0;\r\n"\n')
    assert [row for _, row in local_rows(file, FileOptions())] == [{"a\nb": long, "c": "\0;\r\n"}]


def parquet(path, columns, names=None):
    table = pyarrow.Table.from_arrays(list(columns), names=list(names))
    pyarrow.parquet.write_table(table, path)
    return path


def bad_text():
    """A column of text whose third value is not UTF-8."""
    return pyarrow.Array.from_buffers(pyarrow.string(), 3, pyarrow.array([b"a", b"b", b"\xff\xfe"]).buffers())


@pytest.mark.parametrize(
    ("columns", "names", "message"),
    [
        ([["a"], ["b"]], ["x", "x"], "a.parquet: the column 'x' stands twice"),
        ([["a"] * 3, bad_text()], ["x", "y\n"], "a.parquet, row 3, column 'y\\n': not a value of use ('utf-8' codec"),
        (
            [pyarrow.StructArray.from_arrays([pyarrow.array(["1"]), pyarrow.array(["2"])], names=["a", "a"])],
            ["x"],
            "a.parquet, row 1, column 'x': not a value of use (Converting to Python dictionary is not",
        ),
        (
            [pyarrow.array([0, 10**17], pyarrow.timestamp("ms"))],
            ["at"],
            "a.parquet, row 2, column 'at': not a value of use",
        ),
        ([pyarrow.array([], pyarrow.string())], ["x"], "a.parquet is empty"),
    ],
)
def test_a_parquet_file_with_a_value_that_cannot_be_read_is_named_by_row_and_column(tmp_path, columns, names, message):
    file = parquet(tmp_path / "a.parquet", map(pyarrow.array, columns), names)
    with pytest.raises(StageError) as caught:
        list(local_rows(file, FileOptions()))
    assert message in str(caught.value)
    assert "line" not in str(caught.value)


def test_a_broken_page_of_parquet_and_one_nested_too_deeply_are_named(tmp_path):
    file = parquet(tmp_path / "a.parquet", [pyarrow.array(["abc" * 99] * 99)], ["x"])
    content = bytearray(file.read_bytes())
    content[4:40] = b"\xff" * 36
    file.write_bytes(content)
    kind, value = pyarrow.string(), "x"
    for _ in range(120):
        kind, value = pyarrow.struct([("a", kind)]), {"a": value}
    deep = parquet(tmp_path / "deep.parquet", [pyarrow.array([value], kind)], ["x"])
    for bad in (file, deep):
        with pytest.raises(StageError, match=f"{bad.name}: not a Parquet file that can be read"):
            list(local_rows(bad, FileOptions()))


def test_an_encrypted_parquet_file_is_named(tmp_path):
    file = parquet(tmp_path / "a.parquet", [pyarrow.array(["a"])], ["x"])
    content = file.read_bytes()
    file.write_bytes(b"PARE" + content[4:-4] + b"PARE")  # how files with an encrypted footer begin and end
    with pytest.raises(StageError, match=r"a.parquet: not a Parquet file that can be read"):
        list(local_rows(file, FileOptions()))


def test_values_of_parquet_keep_their_types(tmp_path):
    file = parquet(tmp_path / "a.parquet", [pyarrow.array([datetime.date(2024, 1, 1)]), pyarrow.array([0.5])], "xy")
    assert [row for _, row in local_rows(file, FileOptions())] == [{"x": datetime.date(2024, 1, 1), "y": 0.5}]


def linked(folder, target):
    (folder / "b.jsonl").symlink_to(target)


def listening(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # the name of a socket has 107 characters at most


WRONG = {
    "a broken link": (lambda folder: linked(folder, "nowhere"), "b.jsonl is a link that leads to no file"),
    "a link to itself": (lambda folder: linked(folder, "b.jsonl"), "b.jsonl is a link that leads to no file"),
    "a fifo": (lambda folder: os.mkfifo(folder / "b.jsonl"), "b.jsonl is a FIFO: expected a data file"),
    "a fifo of another name": (lambda folder: os.mkfifo(folder / "pipe"), "pipe is a FIFO: expected a data file"),
    "a socket": (lambda folder: listening(folder / "b.jsonl"), "b.jsonl is a socket: expected a data file"),
    "a device": (lambda folder: linked(folder, "/dev/null"), "b.jsonl is a device: expected a data file"),
    "a linked folder": (lambda folder: linked(folder, folder.parent / "beside"), "b.jsonl is a link to a folder"),
    "a cycle": (lambda folder: linked(folder, folder), "b.jsonl is a link to a folder"),
    "a broken file below": (lambda folder: write(folder / "x/b.jsonl", "{"), "x/b.jsonl, line 1: not valid JSON"),
    "an unknown type": (lambda folder: write(folder / "b.xml", "<a/>"), "b.xml: not a data file that can be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_nothing_in_a_folder_is_passed_over_in_silence(tmp_path, name):
    folder = tmp_path / "raw"
    write(folder / "a.jsonl", LINES)
    write(tmp_path / "beside/c.jsonl", "{")
    make, message = WRONG[name]
    make(folder)
    with pytest.raises(StageError) as caught:
        list(local_rows(folder, FileOptions()))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["README", "NOTE.MD", ".hidden"])
def test_documents_and_hidden_files_are_passed_over_whatever_they_are(tmp_path, name):
    write(tmp_path / "a.jsonl", LINES)
    (tmp_path / name).symlink_to("nowhere")
    assert len(list(local_rows(tmp_path, FileOptions()))) == 2


def test_the_path_itself_may_be_a_link_and_must_lead_to_a_file(tmp_path):
    write(tmp_path / "raw/a.jsonl", LINES)
    for name, target in (("folder", "raw"), ("file.jsonl", "raw/a.jsonl")):
        (tmp_path / name).symlink_to(target)
        assert [row for _, row in local_rows(tmp_path / name, FileOptions())] == ROWS
    (tmp_path / "broken").symlink_to("nowhere")
    with pytest.raises(StageError, match="broken is a link that leads to no file"):
        list(local_rows(tmp_path / "broken", FileOptions()))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(StageError, match=r"pipe.jsonl is a FIFO"):
        list(local_rows(tmp_path / "pipe.jsonl", FileOptions()))


@contextlib.contextmanager
def rights_of_nobody():
    """Without the rights of root, who may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "closed", "closed/b.jsonl"])
def test_what_may_not_be_read_is_named(tmp_path, monkeypatch, name):
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # the folders above are closed, too
    (tmp_path / "closed").mkdir()
    if not name.startswith("closed"):
        write_rows(tmp_path / name).chmod(0)
    (tmp_path / "closed").chmod(0)
    with rights_of_nobody(), pytest.raises(PermissionError) as caught:
        list(local_rows(Path(name), FileOptions()))
    (tmp_path / "closed").chmod(0o755)
    assert caught.value.filename == name  # `errors.run` makes one line of it


def test_a_folder_is_not_read_in_place_of_a_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "owner/name/train.jsonl", LINES)
    with pytest.raises(StageError, match="dataset: owner/name is also a file or folder here"):
        list(hub_rows(HubData("owner/name", "0" * 40, None, None, None, False), None))


def rows_of(path, **options):
    return [row for _, row in local_rows(path, FileOptions(**options))]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t")])
def test_tables_are_parted_by_what_parts_their_header(tmp_path, name, delimiter):
    file = write(tmp_path / name, f'a{delimiter}"b, c; d"\n1{delimiter}x'.encode())
    assert rows_of(file) == [{"a": "1", "b, c; d": "x"}]


@pytest.mark.parametrize(
    ("name", "option", "endings"),
    [
        ("a.jsonl", {"delimiter": ";"}, ".csv or .csv.gz or .tsv or .tsv.gz"),
        ("a.jsonl", {"rows_key": "data"}, ".json or .json.gz"),
        ("a.csv", {"rows_key": "data"}, ".json or .json.gz"),
    ],
)
def test_an_option_that_no_file_is_read_with_is_an_error(tmp_path, name, option, endings):
    file = write(tmp_path / name, b"a;b\n1;2\n" if name == "a.csv" else b'{"a": 1}\n')
    with pytest.raises(StageError, match=rf"{name}: {next(iter(option))} is for files that end in {endings}; make it"):
        rows_of(file, **option)
    write(tmp_path / "b.json", b'{"data": [{"a": 1}]}')
    write(tmp_path / "c.csv", b"a;b\n1;2\n")
    assert rows_of(tmp_path, delimiter=option.get("delimiter", ";"), rows_key="data")


def test_a_header_that_several_delimiters_part_is_an_error_until_one_is_named(tmp_path):
    file = write(tmp_path / "a.csv", b"a,b;c,d\n1,2;3,4")
    with pytest.raises(StageError, match=r"a.csv, line 1: the header has commas and semicolons: say in delimiter"):
        rows_of(file)
    assert rows_of(file, delimiter=";") == [{"a,b": "1,2", "c,d": "3,4"}]
    assert rows_of(write(tmp_path / "b.csv", b"text\n1,2\n"), delimiter="\t") == [{"text": "1,2"}]


def test_rows_may_stand_under_a_key_of_an_object(tmp_path):
    file = write(tmp_path / "a.json", b'{"version": 1,\n "data": {"rows": [{"a": 1}, {"a": 2}]}}')
    assert rows_of(file, rows_key="data.rows") == [{"a": 1}, {"a": 2}]
    with pytest.raises(StageError, match=r"its first line is no JSON object by itself: .*rows_key"):
        rows_of(file)
    with pytest.raises(StageError, match=r"rows_key data.row: expected an object with 'row', found rows"):
        rows_of(file, rows_key="data.row")
    with pytest.raises(StageError, match=r"rows_key version.x: expected an object with 'x', found int"):
        rows_of(file, rows_key="version.x")
    with pytest.raises(StageError, match="expected an array of objects, found dict"):
        rows_of(file, rows_key="data")
