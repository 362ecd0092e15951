"""max_kl: which weights a run ends with whose policy has gone too far from the reference."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.stages.test_resume import cut_short
from tests.stages.test_training import curve, distance, metrics, weights
from tests.stages.tiny_pipeline import call, change

Copy = Callable[..., Path]


def test_a_kl_above_its_limit_ends_with_the_last_weights_within_it(
    copy_of_tiny: Copy, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The second phase is beyond the limit, so the updates of the first are taken back, from a checkpoint."""
    folder = copy_of_tiny()
    change(folder / "params.yaml", {"train_ppo": {"ppo": {"max_kl": 1e-9, "kl": {"estimator": "k3"}}}})
    change(folder / "runtime.yaml", {"default": {"checkpoint_seconds": 0.0}})
    cut_short(folder, "train_ppo", monkeypatch, after=1)
    call(folder, "train_ppo")
    assert "stops in phase 2: the KL" in capsys.readouterr().out
    ours, results = curve(folder, "train_ppo"), metrics(folder, "train_ppo")
    assert ours["objective/kl"][0] == 0
    assert ours["objective/kl"][1] > 1e-9
    assert ours["policy/updates"].isna().tolist() == [False, True]
    assert ours["validation/objective/kl"][1] == 0
    assert (results["stopped_early"], results["kept_iteration"]) == (1, 0)
    assert metrics(tiny, "train_ppo")["stopped_early"] == 0
    assert distance(weights(folder, "ppo"), weights(folder, "sft")) == 0


@pytest.mark.parametrize("keep", ["last", "best"])
def test_the_last_phase_is_within_the_limit_of_the_kl_by_the_held_out_evaluation(copy_of_tiny: Copy, keep: str) -> None:
    """Of one phase: its rollouts are SFT's own, and its updates lead beyond any limit."""
    folder = copy_of_tiny()
    held_out = {"keep": keep, "best_by": {"metric": "objective/kl", "better": "higher"}}
    limited = {"max_kl": 1e-9, "iterations": 1, "policy_optimizer": {"learning_rate": 0.02}, "held_out": held_out}
    change(folder / "params.yaml", {"train_ppo": {"ppo": limited}})
    call(folder, "train_ppo")
    results = metrics(folder, "train_ppo")
    assert (results["validation_kl"], results["kept_iteration"], results["stopped_early"]) == (0, 0, 1)
    assert distance(weights(folder, "ppo"), weights(folder, "sft")) == 0
