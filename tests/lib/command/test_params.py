"""Settings: strict both ways, with the nearest known key."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from stages.lib.command.errors import StageError
from stages.lib.command.params import build, declared_sections, load_yaml, read_params, read_value


@dataclass(frozen=True)
class Inner:
    rate: float


@dataclass(frozen=True)
class Section:
    epochs: int
    optimizer: Inner
    keep: Literal["best", "last"]
    limit: float | None
    names: tuple[str, ...]
    columns: dict[str, str]
    flag: bool

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError("epochs must be at least 1")


GOOD: dict[str, Any] = {
    "epochs": 2,
    "optimizer": {"rate": 1},
    "keep": "best",
    "limit": None,
    "names": ["a", "b"],
    "columns": {"x": "y"},
    "flag": True,
}


def test_a_section_becomes_a_dataclass() -> None:
    built = build(Section, GOOD, "params.yaml: s")
    assert built == Section(2, Inner(1.0), "best", None, ("a", "b"), {"x": "y"}, True)
    assert isinstance(built.optimizer.rate, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 3}, "s.epoch is not a known key; did you mean 'epochs'?"),
        ({"epochs": 2.5}, "s.epochs: expected a whole number, found 2.5 (float)"),
        ({"epochs": True}, "s.epochs: expected a whole number, found True (bool)"),
        ({"epochs": None}, "s.epochs: expected a whole number, found nothing"),
        ({"epochs": 0}, "s: epochs must be at least 1"),
        ({"optimizer": {"rate": "1e-5x"}}, "s.optimizer.rate: expected a number, found '1e-5x' (str)"),
        ({"optimizer": {"rat": 1}}, "s.optimizer.rat is not a known key; did you mean 'rate'?"),
        ({"optimizer": 3}, "s.optimizer: expected a section with keys, found 3 (int)"),
        ({"keep": "bset"}, "s.keep: 'bset' (str) is not one of: best, last; did you mean 'best'?"),
        ({"limit": float("inf")}, "s.limit: expected a finite number, found inf"),
        ({"limit": "none"}, "s.limit: expected a number, found 'none' (str)"),
        ({"names": "a"}, "s.names: expected a list, found 'a' (str)"),
        ({"names": ["a", 1]}, "s.names[1]: expected text, found 1 (int)"),
        ({"columns": ["x"]}, "s.columns: expected a mapping, found ['x'] (list)"),
        ({"flag": 1}, "s.flag: expected true or false, found 1 (int)"),
        ({"flag": "yes"}, "s.flag: expected true or false, found 'yes' (str)"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StageError) as error:
        build(Section, {**GOOD, **change}, "params.yaml: s")
    assert str(error.value) == f"params.yaml: {message}"


def test_a_missing_key_is_named() -> None:
    values = {key: value for key, value in GOOD.items() if key != "limit"}
    with pytest.raises(StageError, match=r"^params.yaml: s.limit is missing$"):
        build(Section, values, "params.yaml: s")


def write(folder: Path, text: str) -> Path:
    path = folder / "params.yaml"
    path.write_text(text)
    return path


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 017\nrate: 1e-5\nword: yes\n")
    assert load_yaml(path) == {"seed": 17, "rate": 1e-5, "word": "yes"}


def test_a_section_and_a_value_are_read_from_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 3\ns: {rate: 2}\n")
    assert read_params("s", Inner, path) == Inner(2.0)
    assert read_value("seed", int, path) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "params.yaml, line 2: not valid YAML"),
        ("- a\n", "expected sections"),
        ("inne: {rate: 1}\n", "section 'inner' is missing; did you mean 'inne'?"),
    ],
)
def test_a_file_that_holds_no_such_section_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(StageError, match=message.replace("?", r"\?")) as error:
        read_params("inner", Inner, write(tmp_path, text))
    assert "params.yaml" in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"params.yaml is missing; run from the project's top folder"):
        read_params("s", Inner, tmp_path / "params.yaml")


def test_a_section_that_no_stage_reads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "s: {rate: 1}\ntrain_mr: {}\n")
    (tmp_path / "dvc.yaml").write_text("stages:\n  a: {params: [s.rate, seed]}\n  b: {params: [train_rm]}\n")
    with pytest.raises(StageError, match=r"no stage reads 'train_mr'; did you mean 'train_rm'\?"):
        read_params("s", Inner)
    assert declared_sections(load_yaml(Path("dvc.yaml"))) == {"s", "seed", "train_rm"}


@pytest.mark.parametrize("seed", ["-1", "4294967296", "1.5"])
def test_a_seed_that_no_generator_takes_is_refused(tmp_path: Path, seed: str) -> None:
    with pytest.raises(StageError, match=r"params.yaml: seed"):
        read_value("seed", int, write(tmp_path, f"seed: {seed}\n"))
