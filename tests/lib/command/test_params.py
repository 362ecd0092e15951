"""Settings: strict both ways, with the nearest known key."""

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Le
from pydantic import Field, model_validator

from stages.lib.command.errors import StageError
from stages.lib.command.params import build, declared_sections, read_params, read_seed, read_value
from stages.lib.command.strict_yaml import load_yaml
from stages.lib.settings.bounds import AnyValue, Several, Text, Whole
from stages.lib.settings.declaration import Settings, block, key


class Inner(Settings):
    rate: float = key(0.5, "speed")


class Plain(Settings):
    type: Literal["plain"] = key("plain", "as it is")
    beta: Annotated[float, Ge(0), Le(1e9)] = key(0.1, "weight")


class Steered(Settings):
    type: Literal["steered"] = key("steered", "towards a target")
    beta: Annotated[float, Ge(0), Le(1)] = key(0.2, "weight")
    target: float = key(6.0, "aim")


class Section(Settings):
    epochs: int = key(1, "passes")
    optimizer: Inner = key(block(Inner, rate=0.25), "AdamW")
    keep: Literal["best", "last"] = key("last", "what to publish")
    limit: float | None = key(None, "none by default")
    names: Several[Text] = key([], "of layers")
    columns: dict[Text, Text] = key({}, "own: ours")
    flag: bool = key(False, "yes or no")
    stage: Annotated[Literal[0, 3], Whole] = key(0, "of sharding")
    loss: Annotated[Plain | Steered, Field(discriminator="type")] = key(block(Plain, beta=0.3), "one of two")
    others: dict[Text, AnyValue] = key({}, "another program's")

    @model_validator(mode="after")
    def _check(self) -> "Section":
        if self.epochs < 1:
            raise ValueError("epochs must be at least 1")
        return self


GOOD: dict[str, Any] = {
    "epochs": 2,
    "optimizer": {"rate": 1},
    "keep": "best",
    "limit": None,
    "names": ["a", "b"],
    "columns": {"x": "y"},
    "flag": True,
    "stage": 3,
    "loss": {"type": "steered", "beta": 1, "target": 6.0},
    "others": {},
}


def test_a_section_becomes_a_model_that_stays_as_it_is() -> None:
    built = build(Section, GOOD, "params.yaml: s")
    assert (built.epochs, built.optimizer, built.names, built.flag) == (2, Inner(rate=1.0), ("a", "b"), True)
    assert built.loss == Steered(type="steered", beta=1.0, target=6.0)
    assert isinstance(built.optimizer.rate, float)
    with pytest.raises(ValueError, match="frozen"):
        built.epochs = 3


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
        ({"limit": float("inf")}, "s.limit: expected a finite number, found inf (float)"),
        ({"limit": 10**400}, f"s.limit: expected a number that a float can hold, found 1{'0' * 39}…{'0' * 40} (int)"),
        ({"limit": "none"}, "s.limit: expected a number, found 'none' (str)"),
        ({"names": "a"}, "s.names: expected a list, found 'a' (str)"),
        ({"names": ["a", 1]}, "s.names[1]: expected text, found 1 (int)"),
        ({"columns": ["x"]}, "s.columns: expected a mapping, found ['x'] (list)"),
        ({"flag": 1}, "s.flag: expected true or false, found 1 (int)"),
        ({"flag": "yes"}, "s.flag: expected true or false, found 'yes' (str)"),
        ({"stage": 1}, "s.stage: 1 (int) is not one of: 0, 3"),
        ({"stage": False}, "s.stage: False (bool) is not one of: 0, 3"),
        ({"stage": 3.0}, "s.stage: 3.0 (float) is not one of: 0, 3"),
        ({"loss": "plain"}, "s.loss: expected a block with a type, one of: plain, steered; found 'plain' (str)"),
        ({"loss": {"beta": 1}}, "s.loss.type is missing; it is one of: plain, steered"),
        (
            {"loss": {"type": "plane"}},
            "s.loss.type: 'plane' (str) is not one of: plain, steered; did you mean 'plain'?",
        ),
        ({"loss": {"type": ["plain"]}}, "s.loss.type: ['plain'] (list) is not one of: plain, steered"),
        ({"loss": {"type": "plain", "beta": 1, "target": 2}}, "s.loss.target is not a known key"),
        ({"loss": {"type": "plain", "beta": -1}}, "s.loss.beta must be at least 0, found -1"),
        (
            {"loss": {"type": "plain", "beta": 2e9}},
            "s.loss.beta must be at least 0 and at most 1000000000.0, found 2000000000.0",
        ),
        (
            {"loss": {"type": "steered", "beta": 2, "target": 1}},
            "s.loss.beta must be at least 0 and at most 1, found 2",
        ),
        ({"target": 2}, "s.target is not a known key; did you mean 'loss.target'?"),
        ({"optimizer_rate": 2}, "s.optimizer_rate is not a known key; did you mean 'optimizer.rate'?"),
        (
            {"columns": {"x": "y", "": "z"}},
            "a key of params.yaml: s.columns: expected a text of 1 to 4096 characters, found '' (str)",
        ),
        ({"columns": {"x": "\0"}}, "s.columns.x: the text '\\x00' (str) holds a character that no file can"),
        (
            {"others": {"dict": {"list": [1, float("nan")]}}},
            "s.others.dict.list[1]: expected a finite number, found nan (float)",
        ),
        ({"others": {"a": [""]}}, "s.others.a[0]: expected a text of 1 to 4096 characters, found '' (str)"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StageError) as error:
        build(Section, {**GOOD, **change}, "params.yaml: s")
    assert str(error.value) == (message if "params.yaml" in message else f"params.yaml: {message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": ...}, "s.limit is missing; its default is null"),
        ({"names": ...}, "s.names is missing; its default is []"),
        ({"keep": ...}, 's.keep is missing; its default is "last"'),
        # What the section gives a block counts more than what the block gives itself.
        ({"optimizer": {}}, "s.optimizer.rate is missing; its default is 0.25"),
        ({"loss": {"type": "plain"}}, "s.loss.beta is missing; its default is 0.3"),
        ({"loss": {"type": "steered", "target": 1.0}}, "s.loss.beta is missing; its default is 0.2"),
    ],
)
def test_a_missing_key_is_named_with_its_default(change: dict[str, Any], message: str) -> None:
    values = {name: value for name, value in {**GOOD, **change}.items() if value is not ...}
    with pytest.raises(StageError) as error:
        build(Section, values, "params.yaml: s")
    assert str(error.value) == f"params.yaml: {message}"


def test_an_unknown_key_is_named_before_a_missing_one_that_it_may_mean() -> None:
    values = {name: value for name, value in GOOD.items() if name != "limit"} | {"limits": 1, "epochs": "x"}
    with pytest.raises(StageError) as error:
        build(Section, values, "params.yaml: s")
    assert str(error.value) == "params.yaml: s.limits is not a known key; did you mean 'limit'?"


def write(folder: Path, text: str) -> Path:
    path = folder / "params.yaml"
    path.write_text(text)
    return path


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 017\nrate: 1e-5\nword: yes\n")
    assert load_yaml(path) == {"seed": 17, "rate": 1e-5, "word": "yes"}


def test_a_section_and_a_value_are_read_from_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 3\ns: {rate: 2}\n")
    assert read_params("s", Inner, path) == Inner(rate=2.0)
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


def test_a_section_without_a_seed_of_its_own_has_the_common_one(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 3\n")
    assert read_seed(SimpleNamespace(seed=None), path) == 3
    assert read_seed(SimpleNamespace(seed=0), path) == 0
