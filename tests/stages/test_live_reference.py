"""TR-DPO: a reference that follows the policy, in the real stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from stages.lib.compute.batching import rows_of_step
from stages.lib.data.token_tables import REFERENCE_SCHEMA, read_table
from stages.lib.runs import training_run
from stages.lib.settings.declaration import block
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.reference_sync import ReferenceSync
from stages.lib.settings.save_every import SaveEvery
from tests.stages.tiny_pipeline import call, change, contents, read_yaml, refusal, write_yaml

Copy = Callable[..., Path]


def with_sync(folder: Path, every: int, mixup: float, **dpo: Any) -> None:
    params = read_yaml(folder / "params.yaml")
    params["train_dpo"]["dpo"] |= {"reference_sync": block(ReferenceSync, every=every, mixup=mixup), **dpo}
    write_yaml(folder / "params.yaml", params)


def curve_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "metrics/curves/dpo.csv")


def test_a_copy_of_the_policy_sets_rewards_back_and_until_then_the_cache_serves(
    copy_of_tiny: Copy, tiny: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = copy_of_tiny()
    with_sync(folder, every=2, mixup=1.0)
    call(folder, "train_dpo")
    curve, plain = curve_of(folder), curve_of(tiny)
    same = ["loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "grad_norm"]
    pd.testing.assert_frame_equal(curve[same][:2], plain[same][:2])
    # Steps 3 and 5 follow a move: policy and reference are one model again.
    for step in (2, 4):
        assert curve["loss"][step] == pytest.approx(0.693147, abs=1e-6)
        assert curve["rewards/chosen"][step] == pytest.approx(0, abs=1e-5)
    assert abs(curve["rewards/chosen"][3]) > 1e-4
    said = capsys.readouterr().out
    assert "the cached log-probs are the reference's up to step 2 of 6" in said
    assert said.count("the reference moves to the policy; from here on a model in memory") == 1


def test_the_reference_is_the_weighted_mean_of_its_past_and_the_policy(copy_of_tiny: Copy) -> None:
    """Made again by hand from the models of the way, and measured by the stage of reference log-probs."""
    folder = copy_of_tiny()
    with_sync(folder, every=2, mixup=0.25, save_every=block(SaveEvery, steps=2, keep_last_k=None))
    call(folder, "train_dpo")
    curve = curve_of(folder)
    reference = load_file(folder / "models/sft/model.safetensors")
    for step in (2, 4):
        policy = load_file(folder / f"models/dpo/step_{step}/model.safetensors")
        reference = {name: 0.25 * policy[name] + 0.75 * weight for name, weight in reference.items()}
        save_file(reference, folder / "models/base/model.safetensors", metadata={"format": "pt"})
        change(folder / "params.yaml", {"ref_logprobs": {"sft": {"model": "models/base"}}})
        call(folder, "ref_logprobs", out="data/moved")
        table = read_table(folder / "data/moved/sft/train.arrow", REFERENCE_SCHEMA)
        rows = table[rows_of_step(step, len(table), 8, 1.0, 17)]
        mean = sum(rows["reference_chosen_logps"]) / 8
        rewards = 0.2 * (curve["logps/chosen"][step] - mean)
        assert curve["rewards/chosen"][step] == pytest.approx(rewards, abs=1e-4)
    assert abs(curve["rewards/chosen"][4]) > 1e-3


def test_under_lora_it_moves_to_the_policy_with_its_adapters_merged(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    with_sync(folder, every=2, mixup=1.0, lora=block(LoraSettings))
    call(folder, "train_dpo")
    curve = curve_of(folder)
    for step in (2, 4):
        assert curve["rewards/chosen"][step] == pytest.approx(0, abs=1e-5)
    assert abs(curve["rewards/chosen"][1]) > 1e-4
    assert abs(curve["rewards/chosen"][3]) > 1e-4


def test_resumed_equals_uninterrupted(copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = copy_of_tiny("whole"), copy_of_tiny("broken")
    for folder in (whole, broken):
        with_sync(folder, every=2, mixup=0.6)
        change(folder / "runtime.yaml", {"default": {"checkpoint_seconds": 0.0}})
    call(whole, "train_dpo")
    record = training_run.TrainingRun.record

    def cut(self: training_run.TrainingRun, step: int, *words: Any) -> None:
        record(self, step, *words)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_run.TrainingRun, "record", cut)
        with pytest.raises(KeyboardInterrupt):
            call(broken, "train_dpo")
    call(broken, "train_dpo")
    for out in ("models/dpo", "metrics/curves/dpo.csv"):
        assert contents(broken / out) == contents(whole / out)


def test_what_cannot_follow_is_refused(copy_of_tiny: Copy, capsys: pytest.CaptureFixture) -> None:
    folder = copy_of_tiny()
    with_sync(folder, every=2, mixup=1.0)
    change(folder / "params.yaml", {"ref_logprobs": {"sft": {"model": "models/base"}}})
    call(folder, "ref_logprobs")
    said = refusal(folder, "train_dpo", capsys)
    assert (
        "params.yaml: train_dpo.dpo.reference_sync: the reference of data/ref_logprobs/sft/train.arrow is not" in said
    )
