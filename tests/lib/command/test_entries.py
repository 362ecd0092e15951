"""Which entry of a section a script runs for."""

import pytest

from stages.lib.command.entries import entry_name
from stages.lib.command.errors import StageError


@pytest.fixture(autouse=True)
def without_dvc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_STAGE", raising=False)


def test_the_one_named_then_that_of_dvcs_stage_then_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert entry_name(None, {"dpo": 1}, "train_dpo") == "dpo"
    monkeypatch.setenv("DVC_STAGE", "train_dpo@ipo")
    assert entry_name(None, ["dpo", "ipo"], "train_dpo") == "ipo"
    assert entry_name("dpo", ["dpo", "ipo"], "train_dpo") == "dpo"


@pytest.mark.parametrize(
    ("given", "entries", "message"),
    [
        (None, ["b", "a"], "section 'train_dpo' has a, b: say which with --name"),
        (None, [], "section 'train_dpo' is empty"),
        ("dpoo", ["dpo", "sft"], "section 'train_dpo' has no entry 'dpoo'; did you mean 'dpo'?; known: dpo, sft"),
        ("dpo", [], "section 'train_dpo' has no entry 'dpo'; it is empty"),
    ],
)
def test_an_entry_that_cannot_be_told(given: str | None, entries: list[str], message: str) -> None:
    with pytest.raises(StageError) as refused:
        entry_name(given, entries, "train_dpo")
    assert str(refused.value) == f"params.yaml: {message}"
