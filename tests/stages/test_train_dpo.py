"""train_dpo with every loss, by the real script: first values, curves, resuming, and what is refused."""

import json
import math
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from stages.lib.command.errors import StageError
from stages.lib.objectives.preference import first_values
from stages.lib.runs.training_run import TrainingRun
from stages.lib.settings import preference_loss as of
from stages.lib.settings.agreement import require_agreement
from stages.lib.settings.declaration import block
from stages.lib.settings.divergence import ForwardKl
from stages.lib.settings.sections import build_all, default_params
from tests.lib.objectives.test_preference_losses import SINGLE, settings_of
from tests.stages.tiny_pipeline import call, change, contents, read_yaml, refusal, write_yaml

Copy = Callable[..., Path]
ALL = {block(kind)["type"]: {"weight": 1.0, "loss": block(kind)} for kind in SINGLE}
MPO = {
    "close": {"weight": 0.8, "loss": block(of.SigmoidLoss, divergence=block(ForwardKl))},
    "absolute": {"weight": 0.2, "loss": block(of.BcoPairLoss, wpo=True)},
    "likely": {"weight": 1.0, "loss": block(of.SftLoss)},
}
LOSSES = {
    "all": block(of.MixtureLoss, parts=ALL),
    "mpo": block(of.MixtureLoss, parts=MPO),
    "aot": block(of.AotLoss),
    "simpo": block(of.SimpoLoss),
    "free": block(of.SigmoidLoss, reference_free=True),
    "ld": block(of.SigmoidLoss, ld_alpha=0.5),
}


def with_losses(folder: Path, losses: dict[str, Any], **changed: Any) -> None:
    """Let train_dpo have an entry for each loss, of one step, with the reference that it reads."""
    params = read_yaml(folder / "params.yaml")
    usual = params["train_dpo"]["dpo"] | {"epochs": 1 / 6} | changed
    params["train_dpo"] = {
        name: deepcopy(usual) | {"loss": loss, "reference": reference_for(loss)} for name, loss in losses.items()
    }
    write_yaml(folder / "params.yaml", params)


def reference_for(loss: dict[str, Any]) -> str:
    return "data/ref_logprobs/sft" if of.needs_reference(built(loss)) else "models/sft"


def built(loss: dict[str, Any]) -> Any:
    kind = next(kind for kind in (*SINGLE, of.MixtureLoss) if block(kind)["type"] == loss["type"])
    return settings_of(kind, **loss)


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny project in which a step with every loss has been taken."""
    folder = tmp_path_factory.mktemp("losses") / "project"
    shutil.copytree(tiny, folder, symlinks=True, ignore=shutil.ignore_patterns(".scratch"))
    change(folder / "params.yaml", {"ref_logprobs": {"sft": {"per_token": True}}})
    call(folder, "ref_logprobs@sft")
    with_losses(folder, LOSSES)
    for name in LOSSES:
        call(folder, f"train_dpo@{name}")
    return folder


def first_row(folder: Path, name: str) -> Any:
    return pd.read_csv(folder / f"metrics/curves/{name}.csv").iloc[0]


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_is_taken_and_measured(trained: Path, name: str) -> None:
    row = first_row(trained, name)
    assert 0 < row["grad_norm"] < math.inf
    assert 0 < row["entropy"] < math.log(400)
    results = json.loads((trained / f"metrics/training/{name}.json").read_text())
    assert all(map(math.isfinite, results.values()))
    assert results["validation_logps_chosen"] != results["validation_logps_chosen_before"]


@pytest.mark.parametrize("kind", ALL)
def test_every_loss_starts_at_its_first_value(trained: Path, kind: str) -> None:
    """In a mixture of all of them. Without a reference it depends on the model."""
    found, known = first_row(trained, "all")[f"loss/{kind}"], first_values(built(LOSSES["all"]))
    assert kind in of.WITHOUT_REFERENCE or found == pytest.approx(known[kind], rel=1e-5)
    assert found > 0


@pytest.mark.parametrize("name", ["aot", "ld"])
def test_a_loss_by_itself_starts_at_ln_2(trained: Path, name: str) -> None:
    row = first_row(trained, name)
    assert row["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert abs(row["rewards/margins"]) < 1e-4


def test_a_mixture_adds_up_its_parts(trained: Path) -> None:
    row = first_row(trained, "mpo")
    assert row["loss/close"] == pytest.approx(math.log(2), rel=1e-5)
    parts = 0.8 * row["loss/close"] + 0.2 * row["loss/absolute"] + row["loss/likely"]
    assert row["loss"] == pytest.approx(parts, rel=1e-6)
    assert row["exponents/clamped"] == 0
    assert 0 < row["wpo/weight"] <= 1
    assert row["loss/absolute"] == pytest.approx(2 * math.log(2) * row["wpo/weight"], rel=1e-5)


def test_parts_and_losses_by_themselves_are_the_same(trained: Path) -> None:
    assert first_row(trained, "all")["loss/simpo"] == first_row(trained, "simpo")["loss"]
    # Nothing is taken off the log-probs of a policy without a reference.
    row = first_row(trained, "free")
    assert row["rewards/chosen"] == pytest.approx(0.1 * row["logps/chosen"], rel=1e-6)
    assert row["logps/chosen"] == first_row(trained, "all")["logps/chosen"]


def stopped_at_step_2(run: TrainingRun, step: int, *_others: Any) -> None:
    if step == 1:
        raise StageError("stopped")
    recorded(run, step, *_others)


recorded = TrainingRun.record


def test_what_losses_keep_between_steps_is_resumed(copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """δ of bco_pair after a stop within the second step: the outs are those of a run that was never stopped."""
    results = []
    for stopped in (False, True):
        folder = copy_of_tiny(f"stopped-{stopped}")
        with_losses(folder, {"bco": block(of.BcoPairLoss, beta=1.0)}, epochs=0.5)
        if stopped:
            change(folder / "runtime.yaml", {"default": {"checkpoint_seconds": 0.0}})
            with monkeypatch.context() as patch:
                patch.setattr(TrainingRun, "record", stopped_at_step_2)
                with pytest.raises(StageError, match="stopped"):
                    call(folder, "train_dpo@bco")
        call(folder, "train_dpo@bco")
        results.append({path: contents(folder / path) for path in ("metrics/curves/bco.csv", "models/bco")})
    assert results[0] == results[1]


def test_a_falling_chosen_log_prob_is_told(copy_of_tiny: Copy, capsys: pytest.CaptureFixture) -> None:
    folder = copy_of_tiny()
    with_losses(folder, {"hinge": block(of.HingeLoss, beta=1.0), "likely": block(of.SftLoss)}, epochs=0.5)
    for name, falls in (("hinge", True), ("likely", False)):
        capsys.readouterr()
        call(folder, f"train_dpo@{name}")
        told = capsys.readouterr().out
        found = json.loads((folder / f"metrics/training/{name}.json").read_text())
        assert (found["validation_logps_chosen"] < found["validation_logps_chosen_before"]) == falls
        assert ("(displacement)" in told) == falls
        assert ("the loss of a policy that is its reference is hinge 1.0000" in told) == falls


def test_discounting_without_log_probs_of_tokens_is_refused(copy_of_tiny: Copy, capsys: pytest.CaptureFixture) -> None:
    folder = copy_of_tiny()
    with_losses(folder, {"ld": LOSSES["ld"]})
    assert "ref_logprobs.sft.per_token: true" in refusal(folder, "train_dpo@ld", capsys)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"loss": block(of.SimpoLoss)},
            "train_dpo.dpo.reference: loss simpo reads no reference, and DVC would wait for data/ref_logprobs/sft; "
            "give it the value of model, models/sft",
        ),
        ({"reference": "models/sft"}, "train_dpo.dpo.reference: expected log-probs of a reference, and models/sft"),
        (
            {"loss": LOSSES["ld"]},
            "train_dpo.dpo.loss: ld_alpha below 1 needs the log-prob of each token under the reference; set "
            "ref_logprobs.sft.per_token: true",
        ),
    ],
)
def test_a_reference_that_does_not_fit_the_loss_is_refused_before_anything_runs(
    changed: dict[str, Any], said: str
) -> None:
    params = default_params()
    params["train_dpo"]["dpo"] |= changed
    with pytest.raises(StageError) as refused:
        require_agreement(build_all(params, Path("params.yaml")), {})
    assert said in str(refused.value)


def test_a_loss_without_a_reference_has_its_model_in_its_place() -> None:
    params = default_params()
    params["train_dpo"]["dpo"] |= {"loss": block(of.OrpoLoss), "reference": "models/sft"}
    require_agreement(build_all(params, Path("params.yaml")), {})
