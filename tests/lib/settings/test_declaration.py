"""Defaults stand in the models; the JSON of settings is that of plain values."""

import json
from typing import Literal

import pytest
from pydantic import BaseModel

from stages.lib.command.strict_yaml import load_yaml
from stages.lib.settings.bounds import Several, Text
from stages.lib.settings.declaration import Settings, block, key, plain
from stages.lib.settings.runtime import Runtime
from stages.lib.settings.sections import Params, build_all, default_params
from tests.real_files import PROJECT


class Inner(Settings):
    rate: float = key(0.5, "speed")
    names: Several[Text] = key(["a"], "of layers")


class Outer(Settings):
    kind: Literal["x"] = key("x", "which")
    inner: Inner = key(block(Inner, rate=0.25), "a block")
    other: Inner | None = key(None, "none")


def test_the_default_of_a_block_is_that_of_its_keys_with_what_was_changed() -> None:
    assert block(Outer) == {"kind": "x", "inner": {"rate": 0.25, "names": ["a"]}, "other": None}
    assert block(Outer, other=block(Inner))["other"] == {"rate": 0.5, "names": ["a"]}
    with pytest.raises(ValueError, match="Outer has no key inne"):
        block(Outer, inne=1)


def test_who_changes_what_was_given_changes_no_default() -> None:
    block(Outer)["inner"]["names"].append("b")
    assert block(Outer)["inner"]["names"] == ["a"]


def test_the_json_of_settings_is_that_of_their_keys_in_order() -> None:
    settings = Outer(kind="x", inner=Inner(rate=1, names=["q", "v"]), other=None)
    assert json.dumps(plain(settings)) == '{"kind": "x", "inner": {"rate": 1.0, "names": ["q", "v"]}, "other": null}'
    assert (plain(17), plain(False)) == (17, False)


def test_the_committed_files_are_the_defaults() -> None:
    assert load_yaml(PROJECT / "params.yaml") == default_params()
    assert load_yaml(PROJECT / "runtime.yaml") == {"default": block(Runtime)}


def test_the_defaults_are_settings_that_run() -> None:
    built = build_all(default_params(), PROJECT / "params.yaml")
    assert {name: json.loads(json.dumps(plain(value))) for name, value in built.items()} == default_params()


def models_below(model: type[BaseModel]) -> set[type[BaseModel]]:
    """A model, and those of the blocks in it."""
    found = {model}
    pending = [field.annotation for field in model.model_fields.values()]
    while pending:
        kind = pending.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= models_below(kind)
        pending += getattr(kind, "__args__", ())
    return found


@pytest.mark.parametrize("model", sorted(models_below(Params) | {Runtime}, key=lambda model: model.__name__))
def test_every_key_is_declared_whole(model: type[BaseModel]) -> None:
    """Strict, bounded by nothing that is not a number, and never filled in."""
    assert issubclass(model, Settings)
    assert model.__doc__ != Settings.__doc__
    for field in model.model_fields.values():
        assert field.description
        assert "default" in field.json_schema_extra
        assert field.is_required()
