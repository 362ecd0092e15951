"""Replies to held-out prompts while SFT and DPO train: they are shown, and no byte of an out changes by them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.stages.tiny_pipeline import ENTRIES, call, change, contents
from tests.tracked_values import tensorboard_texts


@pytest.mark.parametrize(("stage", "evaluations"), [("train_sft", 4), ("train_dpo", 2)])
def test_replies_are_shown_at_each_evaluation_and_change_nothing(
    copy_of_tiny: Callable[[str], Path],
    tiny: Path,
    capsys: pytest.CaptureFixture,
    stage: str,
    evaluations: int,
) -> None:
    entry = ENTRIES[stage]
    outs = [f"models/{entry}", f"metrics/training/{entry}.json", f"metrics/curves/{entry}.csv"]
    for shown in (0, 2):
        folder = copy_of_tiny(str(shown))
        change(folder / "runtime.yaml", {"default": {"shown_samples": shown, "trackers": ["tensorboard"]}})
        capsys.readouterr()
        call(folder, stage)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
        assert len(lines) == shown * evaluations
        assert all(" -> " in line for line in lines)
        for out in outs:
            assert contents(folder / out) == contents(tiny / out)
    (run,) = (folder / "runs/tensorboard").iterdir()
    assert {name: len(texts) for name, texts in tensorboard_texts(run).items()} == dict.fromkeys(
        ("replies/1", "replies/2"), evaluations
    )
