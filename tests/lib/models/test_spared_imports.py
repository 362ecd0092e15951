"""A package is not there within the block, and is again after it; one that is in use stays so."""

import importlib.util
import json
import sys

import pytest

from stages.lib.models.spared_imports import spared


def test_a_package_is_spared_within_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    with spared("wave"):
        assert importlib.util.find_spec("wave") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("wave")
    assert "wave" not in sys.modules
    assert importlib.import_module("wave").__name__ == "wave"


def test_what_is_in_use_stays_there() -> None:
    with spared("json"):
        assert importlib.import_module("json") is json
    assert sys.modules["json"] is json
