"""The table of losses, by its own program, on the tiny pipeline."""

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import loss_table
from stages.lib.command.errors import StageError
from stages.lib.command.strict_yaml import load_yaml
from stages.lib.settings.sections import build_all
from tests.stages.tiny_pipeline import change, inside

Copy = Callable[..., Path]


def test_every_loss_has_settings_that_run_and_the_reference_that_it_reads(tiny: Path) -> None:
    source = load_yaml(tiny / "params.yaml")
    for name in loss_table.LOSSES:
        built = build_all(loss_table.params_of(f"{name}-3", name, 3, source), Path("params.yaml"))
        entry = built["train_dpo"][f"{name}-3"]
        wanted = "data/ref_logprobs/sft" if entry.reads_reference else "models/sft"
        assert (entry.seed, entry.reference, entry.batch_size) == (3, wanted, 8)
        assert f"models/{name}" not in map(str, loss_table.INPUTS)


def test_the_best_are_those_of_the_highest_gold() -> None:
    gold = {"a": 0.5, "b": 2.0, "c": 1.0}
    results = {name: (name, {"evaluate": {"gold_minus_reference_mean": own}}) for name, own in gold.items()}
    assert loss_table.best_of(results, 2) == ["b", "c"]
    assert list(loss_table.entries(["b"], [None, 5])) == [("b", "b", None), ("b-5", "b", 5)]


def test_what_does_not_beat_sft_is_said() -> None:
    lows = {"a": 0.5, "b": 0.0, "b-18": -0.25}
    results = {entry: (entry[0], {"evaluate": {"gold_minus_reference_ci_low": low}}) for entry, low in lows.items()}
    assert loss_table.told(results) == "Not above SFT with their interval: b, b-18.\n\n"
    assert loss_table.told({"a": results["a"]}) == "All are above SFT.\n\n"
    assert loss_table.told(results | {"c": ("c", {"evaluate": {}})}) == ""


@pytest.mark.slow
def test_a_table_is_written_and_goes_on_where_it_was(copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of_tiny()
    change(folder / "params.yaml", {"train_dpo": {"dpo": {"epochs": 0.17}}})
    with inside(folder):
        loss_table.main(Path("table.md"), Path("losses"), only=["simpo"])
        head, row = Path("table.md").read_text().splitlines()[-3::2]
        assert head == "| loss | seed | gold above SFT | 95 % | accuracy | KL | chosen |"
        assert row.startswith("| simpo | 17 | ")
        # What is there already is not run again.
        monkeypatch.setattr(loss_table, "stage", None)
        loss_table.main(Path("again.md"), Path("losses"), only=["simpo"])
        assert Path("again.md").read_text() == Path("table.md").read_text()
        Path("models/sft").rename("models/other")
        with pytest.raises(StageError, match="models/sft is missing: run the pipeline"):
            loss_table.main(Path("table.md"), Path("losses"), only=["simpo"])
