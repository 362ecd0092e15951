"""YAML that is read, and YAML that is refused in one line with file and line."""

from pathlib import Path

import pytest

from stages.lib.command.errors import StageError, one_line
from stages.lib.command.strict_yaml import load_yaml


def written(folder: Path, text: str) -> Path:
    path = folder / "params.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 0x10\nb: 1_000\nc: 1e-5\nd: yes\ne: -0.0\nf: 09\n", [16, 1000, 1e-5, "yes", -0.0, 9]),
        ("\ufeffa: 1\n", [1]),
        ("a:\nb: ~\nc: null\nd: Null\n", [None] * 4),
        ("a: _\nb: +\nc: 1:30\nd: 0o8\n", ["_", "+", "1:30", "0o8"]),
        ("%YAML 1.2\n---\na: {b: [1, 2.5, true]}\n...\n", [{"b": [1, 2.5, True]}]),
        ("a: 99999999999999999999\n", [99999999999999999999]),
        ("'5': x\n", ["x"]),
    ],
)
def test_values_are_those_of_yaml_1_2(tmp_path: Path, text: str, expected: list) -> None:
    assert list(load_yaml(written(tmp_path, text)).values()) == expected


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
DIGITS = "9" * 5000
REFUSED = [
    ("a: 1\nb: !!int abc\n", 2, "the tag tag:yaml.org,2002:int is not read"),
    ("a: !!float abc", 1, "the tag tag:yaml.org,2002:float is not read"),
    ("a: !!bool maybe", 1, "is not read"),
    ("a: !!timestamp x", 1, "is not read"),
    ("a: !!python/object:os.system x", 1, "the tag tag:yaml.org,2002:python/object:os.system is not read"),
    ("a: !!set {b}", 1, "is not read"),
    ("a: !!omap [b: 1]", 1, "is not read"),
    ("a: !!binary é", 1, "is not read"),
    ("a: ! 5", 1, "the tag ! is not read"),
    ("!!map\na: 1", 1, "is not read"),
    (BOMB, 2, "the alias *a is not read: write its value out"),
    ("a: &a [*a]", 1, "the alias *a is not read"),
    ("a: &a {c: 1}\nb: {<<: *a}", 2, "is not read"),
    ("a: 2024-13-45", 1, "2024-13-45 cannot be read as a value (month must be in 1..12)"),
    ("a: 0000-00-00", 1, "cannot be read as a value (year 0 is out of range)"),
    (f"a: 1\nb: {DIGITS}", 2, "…9999999999999999999999999999999999999999 cannot be read as a value (Exceeds the limit"),
    ("a: -_", 1, "-_ cannot be read as a value"),
    ("a: 0x_", 1, "0x_ cannot be read as a value"),
    ("a: " + "[" * 3000, 1, "more than 50 levels of keys and lists"),
    ("\n".join(" " * depth + "a:" for depth in range(3000)), 50, "more than 50 levels"),
    ("5: x", 1, "a key must be text, found 5: put it in quotes"),
    ("null: x", 1, "a key must be text, found null"),
    (": x", 1, "a key must be text, found nothing"),
    ("true: x", 1, "a key must be text, found true"),
    ("a: {1.5: x}", 1, "a key must be text, found 1.5"),
    ("[a, b]: x", 1, "a key must be text, found a sequence"),
    ("? {a: b}\n: x", 1, "a key must be text, found a mapping"),
    ("a: 1\nb:\n  c: 1\n  c: 2", 4, "the key c stands twice"),
    ("a: 1\n---\nb: 2", 2, "not valid YAML (but found another document)"),
    ("a:\n\tb: 1", 2, "not valid YAML (found character '\\t'"),
    ("a: 'x", 1, "not valid YAML (found unexpected end of stream)"),
    ("a: |\n  x\n y: 1", 3, "not valid YAML (expected <block end>"),
    ("%YAML 9.9\n---\na: yes", 1, "not valid YAML (found incompatible YAML document"),
]
WITHOUT_LINE = [
    ("a: \x01", "not valid YAML (special characters are not allowed)"),
    ("a: \udc80", "not UTF-8 text (invalid continuation byte)"),
    ("", "expected sections (key: value), found nothing"),
    ("# a comment", "expected sections (key: value), found nothing"),
    ("- a", "expected sections (key: value), found list"),
    ("a", "expected sections (key: value), found str"),
]


@pytest.mark.parametrize(("text", "line", "message"), REFUSED)
def test_a_fault_is_one_line_with_file_and_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(StageError) as caught:
        load_yaml(path)
    said = str(caught.value)
    assert said.startswith(f"{path}, line {line}: ")
    assert message in said
    assert len(one_line(said)) < 300 + len(str(path))


@pytest.mark.parametrize(("text", "message"), WITHOUT_LINE)
def test_a_file_that_holds_no_keys_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(StageError) as caught:
        load_yaml(path)
    assert str(caught.value) == f"{path}: {message}"


def test_what_is_not_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").mkdir()
    with pytest.raises(StageError, match="is not a file"):
        load_yaml(tmp_path / "params.yaml")
    with pytest.raises(StageError, match="is missing; run from the project's top folder"):
        load_yaml(tmp_path / "other.yaml")


def test_what_a_reader_changes_no_other_reads(tmp_path: Path) -> None:
    path = written(tmp_path, "seeds: {first: 17}\n")
    load_yaml(path)["seeds"]["first"] = 18
    assert load_yaml(path) == {"seeds": {"first": 17}}
    path.write_text("seeds: {first: 19}\n")
    assert load_yaml(path) == {"seeds": {"first": 19}}
