"""`save_every`: whole model folders of steps on the way, in every training stage, killed or not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from stages.lib.runs.scratch import ScratchFolder
from tests.pipeline.graph import stage_names
from tests.stages.tiny_pipeline import call, change, contents, new_project, read_yaml, write_yaml

STEPS = {"train_sft@sft": 5, "train_rm@rm": 2, "train_dpo@dpo": 2, "train_ppo@ppo": 1, "train_grpo@grpo": 1}
NOT_NEEDED = ("code_manifest", "evaluate", "evaluate_rm", "score_samples", "report")


def folder_of(stage: str) -> str:
    return f"models/{stage.partition('@')[2]}"


def with_saves(folder: Path, keep_last_k: int | None = None, **more: Any) -> None:
    for stage, steps in STEPS.items():
        section, _, name = stage.partition("@")
        change(
            folder / "params.yaml",
            {section: {name: {"save_every": {"steps": steps, "keep_last_k": keep_last_k}, **more}}},
        )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny project in which every training stage has kept all model folders of the way."""
    folder = new_project(tmp_path_factory.mktemp("saved"))
    with_saves(folder)
    for stage in stage_names():
        if stage.partition("@")[0] not in NOT_NEEDED:
            call(folder, stage)
    return folder


def without_state(saved: Path, target: Path) -> Path:
    return Path(shutil.copytree(saved, target, symlinks=True, ignore=shutil.ignore_patterns(".scratch")))


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step_*"))


def config_of(folder: Path) -> dict[str, Any]:
    """Without the mean and deviation of held-out scores, which a reward model has from the end of its training."""
    config = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in config.items() if key not in ("mean", "std")}


@pytest.mark.parametrize("stage", [*STEPS])
def test_each_is_a_model_by_itself(stage: str, saved: Path) -> None:
    folder = saved / folder_of(stage)
    kind = AutoModelForSequenceClassification if stage == "train_rm@rm" else AutoModelForCausalLM
    found = [path for path in folder.iterdir() if path.is_dir()]
    assert found
    models = []
    for path in [*found, folder]:
        models.append(kind.from_pretrained(path).eval())
        tokenizer = AutoTokenizer.from_pretrained(path)
        ids = tokenizer("a good film", return_tensors="pt").input_ids
        assert models[-1](input_ids=ids).logits.isfinite().all()
        assert config_of(path) == config_of(folder)
    weights = [torch.cat([weight.flatten() for weight in model.parameters()]) for model in models]
    assert all(not torch.equal(weights[0], other) for other in weights[1:])
    card = (found[0] / "README.md").read_text()
    assert f"# {stage}" in card
    assert f"| step | {found[0].name.removeprefix('step_')} |" in card


def test_every_so_many_steps_but_the_last(saved: Path) -> None:
    total = json.loads((saved / "metrics/training/sft.json").read_text())["steps"]
    assert total == 16
    assert steps_in(saved / "models/sft") == ["step_10", "step_15", "step_5"]
    assert json.loads((saved / "metrics/training/rm.json").read_text())["steps"] == 6
    assert steps_in(saved / "models/rm") == ["step_2", "step_4", "step_6"]  # of which the best is models/rm
    assert steps_in(saved / "models/dpo") == ["step_2", "step_4"]
    assert steps_in(saved / "models/ppo") == steps_in(saved / "models/grpo") == ["step_1", "step_2"]


def test_a_step_on_the_way_is_that_of_a_run_that_ends_there(saved: Path, tmp_path: Path) -> None:
    """With a constant learning rate and an average; 10 of 16 steps are 1.25 of 2 epochs."""
    constant = {"optimizer": {"schedule": "constant", "warmup_ratio": 0.0, "ema_decay": 0.5}}
    weights = []
    for epochs, name in ((2.0, "models/sft/step_10"), (1.25, "models/sft")):
        folder = without_state(saved, tmp_path / str(epochs))
        change(folder / "params.yaml", {"train_sft": {"sft": {"epochs": epochs, **constant}}})
        call(folder, "train_sft@sft")
        weights.append(load_file(folder / name / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


class Cut(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("keep_last_k", [None, 1])
@pytest.mark.parametrize("stage", [*STEPS])
def test_killed_and_resumed_is_as_never_killed(
    stage: str, keep_last_k: int | None, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = without_state(saved, tmp_path / "cut")
    whole = folder / folder_of(stage)
    if keep_last_k:
        with_saves(folder, keep_last_k)
        call(folder, stage)
        assert len(steps_in(whole)) == 1
        shutil.rmtree(folder / ".scratch")
    expected = contents(whole)
    shutil.rmtree(whole)
    change(folder / "runtime.yaml", {"default": {"checkpoint_seconds": 0.0}})
    for kill in (2, 1):  # after the second folder is there, twice, before its step's checkpoint
        cut_in(monkeypatch, folder, stage, kill)
        assert not whole.exists()
    call(folder, stage)
    assert contents(whole) == expected


def cut_in(monkeypatch: pytest.MonkeyPatch, folder: Path, stage: str, number: int) -> None:
    """Run a stage until it has written so many folders, and kill it right after."""
    keep, calls = ScratchFolder.keep_model, []

    def counted(self: ScratchFolder, *arguments: Any) -> None:
        keep(self, *arguments)
        calls.append(arguments)
        if len(calls) == number:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(ScratchFolder, "keep_model", counted)
        try:
            call(folder, stage)
        except Cut:
            return
    raise AssertionError("it ended before it was cut")


def test_with_adapters_and_an_average_it_is_what_would_be_published(saved: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = without_state(saved, tmp_path / "lora")
    lora = {
        "rank": 2,
        "alpha": 4,
        "targets": "all-linear",
        "experts": False,
        "routers": False,
        "rslora": False,
        "base_quantization": None,
    }
    change(
        folder / "params.yaml",
        {"train_sft": {"sft": {"lora": lora | {"save_adapter": True}, "optimizer": {"ema_decay": 0.5}}}},
    )
    call(folder, "train_sft@sft")
    way = folder / "models/sft/step_15"
    merged = AutoModelForCausalLM.from_pretrained(way).eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "models/base"), way / "adapter")
    ids = torch.arange(3, 40)[None]
    assert torch.allclose(merged(ids).logits, adapted.eval()(ids).logits, atol=1e-5)
    assert not (way / "step_15").exists()


def test_no_folders_are_kept_unasked(saved: Path, tmp_path: Path) -> None:
    folder = without_state(saved, tmp_path / "none")
    change(folder / "params.yaml", {"train_dpo": {"dpo": {"save_every": None}}})
    call(folder, "train_dpo@dpo")
    assert steps_in(folder / "models/dpo") == []
    weights = [(path / "models/dpo/model.safetensors").read_bytes() for path in (saved, folder)]
    assert weights[0] == weights[1]


def test_one_of_them_is_evaluated_as_a_policy(saved: Path, tmp_path: Path) -> None:
    folder = without_state(saved, tmp_path / "evaluated")
    settings = read_yaml(folder / "params.yaml")
    settings["evaluate"]["policies"] = {
        "before": "models/dpo/step_2",
        "again": "models/dpo/step_2",
        "dpo": "models/dpo",
    }
    write_yaml(folder / "params.yaml", settings)
    for name in ("before", "again", "dpo"):
        call(folder, f"evaluate@{name}")
    found = {name: (folder / f"metrics/evaluate/{name}.json").read_bytes() for name in settings["evaluate"]["policies"]}
    assert found["before"] == found["again"]
    assert found["before"] != found["dpo"]
