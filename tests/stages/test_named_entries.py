"""Sections that map names to settings: several models of one kind, none, and graphs that start or end elsewhere."""

import json
import shutil
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from stages.lib.command.errors import StageError
from stages.lib.settings.check import check_settings
from stages.lib.settings.critic import SeparateCritic
from stages.lib.settings.declaration import block
from stages.lib.settings.preference_loss import IpoLoss
from stages.lib.settings.ref_logprobs import RefLogprobs
from tests.stages.test_resume import Cut
from tests.stages.tiny_pipeline import call, change, contents, inside, read_yaml, refusal, write_yaml

Copy = Callable[..., Path]
TRAINING = ("train_sft", "train_rm", "ref_logprobs", "train_dpo", "train_ppo", "train_grpo", "evaluate_rm")


def with_sections(folder: Path, sections: dict[str, Any]) -> None:
    """Put whole sections in place of those of params.yaml; what is trained or evaluated and not named there goes."""
    settings = read_yaml(folder / "params.yaml")
    for name in TRAINING:
        settings[name] = {entry: settings[name].get(entry, {}) | own for entry, own in sections.get(name, {}).items()}
    settings["evaluate"]["policies"] = {}
    settings["score_samples"] |= {"policies": [], "reward_model": None}
    for name, own in sections.items():
        if name not in TRAINING:
            settings[name] |= own
    write_yaml(folder / "params.yaml", settings)


def without_results(folder: Path) -> None:
    """As a project in which nothing has been trained yet."""
    for path in ("models", "metrics/training", "metrics/curves", "metrics/evaluate", "metrics/evaluate_rm"):
        for entry in (folder / path).iterdir():
            if entry.name not in ("base", ".gitkeep"):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for path in ("data/samples", "data/sample_scores", "metrics/score_samples"):
        for entry in (folder / path).iterdir():
            if entry.name != ".gitkeep":
                entry.unlink()


def run_stages(folder: Path, *stages: str) -> str:
    """Check the settings as the first stage does, run the stages and the report. Returns the report."""
    with inside(folder):
        check_settings()
    for stage in (*stages, "report"):
        call(folder, stage)
    return (folder / "metrics/report.html").read_text()


def with_second_policy(folder: Path) -> None:
    settings = read_yaml(folder / "params.yaml")
    settings["train_dpo"]["ipo-2"] = deepcopy(settings["train_dpo"]["dpo"]) | {"loss": block(IpoLoss)}
    settings["evaluate"]["policies"] = {"sft": "models/sft", "dpo": "models/dpo", "ipo-2": "models/ipo-2"}
    settings["score_samples"]["policies"] = ["ipo-2"]
    write_yaml(folder / "params.yaml", settings)


def test_two_entries_are_two_models_with_metrics_of_their_own(copy_of_tiny: Copy, tiny: Path) -> None:
    folder = copy_of_tiny()
    with_second_policy(folder)
    page = run_stages(folder, "train_dpo@ipo-2", "train_dpo@dpo", "evaluate@ipo-2", "score_samples@ipo-2")
    assert contents(folder / "models/dpo") == contents(tiny / "models/dpo")
    first, second = (load_file(folder / f"models/{name}/model.safetensors") for name in ("dpo", "ipo-2"))
    assert any(not first[name].equal(second[name]) for name in first)
    assert json.loads((folder / "metrics/training/ipo-2.json").read_text())["kept_step"] == 6
    assert (folder / "metrics/curves/ipo-2.csv").is_file()
    assert '"train_dpo.ipo-2"' in (folder / "models/ipo-2/README.md").read_text()
    for name in ("dpo", "ipo-2"):
        assert f"<code>{name}</code>, by <code>train_dpo</code>" in page
    assert "DPO cannot be told" in page or "DPO beats" in page or "DPO falls" in page
    # What params.yaml does not name is not shown, though its files are there.
    assert (folder / "metrics/evaluate/ppo.json").is_file()
    assert "<strong>PPO</strong>" not in page


def test_several_entries_need_a_name_and_only_one_that_is_there(
    copy_of_tiny: Copy, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of_tiny()
    with_second_policy(folder)
    assert "'train_dpo' has dpo, ipo-2: say which with --name" in refusal(folder, "train_dpo", capsys)
    assert "has no entry 'ipo2'; did you mean 'ipo-2'?" in refusal(folder, "train_dpo@ipo2", capsys)
    monkeypatch.setenv("DVC_STAGE", "train_dpo@ipo-2")
    call(folder, "train_dpo")
    assert (folder / "models/ipo-2/config.json").is_file()


def test_each_entry_goes_on_from_its_own_state(
    copy_of_tiny: Copy, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Two of equal settings, the second started while the first one's state is there."""
    from stages.lib.runs.training_run import TrainingRun

    folder = copy_of_tiny()
    settings = read_yaml(folder / "params.yaml")
    settings["train_dpo"]["twin"] = deepcopy(settings["train_dpo"]["dpo"])
    write_yaml(folder / "params.yaml", settings)
    change(folder / "runtime.yaml", {"default": {"checkpoint_seconds": 0.0}})
    record = TrainingRun.record

    def cut(self: TrainingRun, step: int, *words: Any) -> None:
        record(self, step, *words)
        if step == 3:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "record", cut)
        with pytest.raises(Cut):
            call(folder, "train_dpo@dpo")
    capsys.readouterr()
    call(folder, "train_dpo@twin")
    assert "resuming" not in capsys.readouterr().out
    shutil.rmtree(folder / "models/dpo")
    call(folder, "train_dpo@dpo")
    assert "resuming from step 3" in capsys.readouterr().out
    assert contents(folder / "models/dpo") == contents(tiny / "models/dpo")
    twins = [(folder / f"models/{name}/model.safetensors").read_bytes() for name in ("dpo", "twin")]
    assert twins[0] == twins[1]


def test_sft_alone_runs_to_the_report(copy_of_tiny: Copy) -> None:
    """Without rows of other kinds, whose tables of an earlier run lie there and are not read."""
    folder = copy_of_tiny()
    without_results(folder)
    for kind in ("preference", "prompts"):
        (folder / f"data/tokens/test/{kind}.arrow").write_text("of an earlier run")
    with_sections(
        folder,
        {
            "train_sft": {"sft": {}},
            "evaluate": {"policies": {"base": "models/base", "sft": "models/sft"}, "reference": "models/base"},
            "prepare_data": {"kinds": ["sft"]},
        },
    )
    page = run_stages(folder, "train_sft", "evaluate@base", "evaluate@sft")
    results = json.loads((folder / "metrics/evaluate/sft.json").read_text())
    before = json.loads((folder / "metrics/evaluate/base.json").read_text())
    assert results["sft_perplexity"] < before["sft_perplexity"]
    assert results["prompts"] == 12
    assert "gold_mean" not in results
    assert "preference_accuracy" not in results
    samples = [json.loads(line) for line in (folder / "data/samples/sft.jsonl").read_text().splitlines()]
    assert all(sample["prompt"][-1]["role"] == "user" for sample in samples)
    assert "The perplexity of 12 test texts is " in page
    assert "Reward models" not in page
    assert "<strong>SFT</strong>" in page
    assert "train_rm" not in page


def test_preference_optimization_from_the_base_runs_to_the_report(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    without_results(folder)
    with_sections(
        folder,
        {
            "ref_logprobs": {"start": block(RefLogprobs, model="models/base")},
            "train_dpo": {"dpo": {"model": "models/base", "reference": "data/ref_logprobs/start"}},
            "evaluate": {"policies": {"dpo": "models/dpo"}, "reference": "models/base"},
            "prepare_data": {"kinds": ["sft", "preference"]},
        },
    )
    page = run_stages(folder, "ref_logprobs@start", "train_dpo", "evaluate")
    assert "preference_accuracy" in json.loads((folder / "metrics/evaluate/dpo.json").read_text())
    assert "Neither a gold utility nor a reward model says which policy is better than models/base." in page
    assert "<strong>models/base</strong>" in page


def test_policies_of_a_given_reward_model_run_to_the_report_without_sft(copy_of_tiny: Copy) -> None:
    """The reward model is a folder that no stage makes; the critic of PPO starts from the language model."""
    folder = copy_of_tiny()
    shutil.copytree(folder / "models/rm", folder / "data/raw/given")
    without_results(folder)
    start = {"model": "models/base", "reference": "models/base", "reward_model": "data/raw/given"}
    with_sections(
        folder,
        {
            "train_ppo": {"ppo": start | {"critic": block(SeparateCritic, path="models/base")}},
            "train_grpo": {"grpo": start},
            "evaluate": {"policies": {"ppo": "models/ppo", "grpo": "models/grpo"}, "reference": "models/base"},
            "score_samples": {"policies": ["ppo", "grpo"], "reward_model": "data/raw/given", "judge": "data/raw/given"},
            "prepare_data": {"kinds": ["sft", "prompts"]},
        },
    )
    of_policies = [f"{stage}@{name}" for stage in ("evaluate", "score_samples") for name in ("ppo", "grpo")]
    page = run_stages(folder, "train_ppo", "train_grpo", *of_policies)
    assert "On 12 test prompts, GRPO " in page
    assert "mean gold utility" in page
    assert "train_rm" not in page


def test_another_reference_than_the_start_is_what_the_kl_is_measured_to(copy_of_tiny: Copy) -> None:
    import pandas as pd

    folder = copy_of_tiny()
    change(folder / "params.yaml", {"train_ppo": {"ppo": {"reference": "models/base"}}})
    change(folder / "params.yaml", {"train_grpo": {"grpo": {"reference": "models/base"}}})
    for name in ("ppo", "grpo"):
        call(folder, f"train_{name}")
        assert pd.read_csv(folder / f"metrics/curves/{name}.csv")["objective/kl"][0] != 0


def of(section: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    """A change of params.yaml: values of the entries of a section, or of the section."""

    def edit(settings: dict[str, Any]) -> None:
        for value in settings[section].values() if section in TRAINING else [settings[section]]:
            value |= values

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            of("train_dpo", model="models/sfd"),
            "train_dpo.dpo.model: models/sfd is neither there nor made by a stage; did you mean 'models/sft'?",
        ),
        (
            of("train_dpo", reference="data/ref_logprobs/base"),
            "train_dpo.dpo.reference: data/ref_logprobs/base is neither there nor made by a stage",
        ),
        (
            of("train_dpo", reference="models/sft"),
            "train_dpo.dpo.reference: expected log-probs of a reference, and models/sft, which train_sft.sft makes, "
            "is a language model",
        ),
        (
            of("train_ppo", reward_model="models/dpo"),
            "train_ppo.ppo.reward_model: expected a reward model or an ensemble of reward models, and models/dpo, "
            "which train_dpo.dpo makes, is a language model",
        ),
        (
            of("train_rm", model="models/rm"),
            "train_rm.rm.model: models/rm is what train_rm.rm itself makes",
        ),
        (of("evaluate", policies={"x": "models/x"}), "evaluate.policies.x: models/x is neither there nor made"),
        (
            of("score_samples", policies=["spo"]),
            "score_samples.policies: evaluate.policies has no 'spo', so there are no samples of it",
        ),
        (
            of("prepare_data", kinds=["sft", "preference"]),
            "train_ppo.ppo needs rows of kind prompts, which prepare_data.kinds lacks; add it there, or take "
            "train_ppo.ppo out",
        ),
        (
            of("ref_logprobs", precision="bf16"),
            "ref_logprobs.sft.precision is bf16 and train_dpo.dpo.precision fp32, of one model",
        ),
        (
            lambda settings: settings["train_dpo"].update(rm=settings["train_dpo"].pop("dpo")),
            "train_rm and train_dpo both have 'rm', and would write models/rm; rename one",
        ),
        (
            lambda settings: settings["train_dpo"].update(base=settings["train_dpo"].pop("dpo")),
            "prepare_base and train_dpo both have 'base', and would write models/base; rename one",
        ),
        (
            lambda settings: settings["train_dpo"].update({"../x": settings["train_dpo"].pop("dpo")}),
            "a key of params.yaml: train_dpo: expected ",
        ),
    ],
)
def test_what_params_yaml_names_is_checked_before_anything_runs(
    tiny: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    for name in ("dvc.yaml", "runtime.yaml"):
        shutil.copy(tiny / name, tmp_path / name)
    (tmp_path / "stages").symlink_to(tiny / "stages")
    settings = read_yaml(tiny / "params.yaml")
    edit(settings)
    write_yaml(tmp_path / "params.yaml", settings)
    with inside(tmp_path), pytest.raises(StageError) as refused:
        check_settings()
    assert message in str(refused.value)


def test_a_given_model_and_a_folder_within_a_made_one_may_be_named(tiny: Path, tmp_path: Path) -> None:
    for name in ("dvc.yaml", "runtime.yaml"):
        shutil.copy(tiny / name, tmp_path / name)
    (tmp_path / "stages").symlink_to(tiny / "stages")
    shutil.copytree(tiny / "models/sft", tmp_path / "data/raw/given")
    settings = read_yaml(tiny / "params.yaml")
    settings["evaluate"]["policies"] |= {"half": "models/dpo/step_3", "given": "data/raw/given"}
    of("train_dpo", model="data/raw/given", save_every={"steps": 3, "keep_last_k": None})(settings)
    write_yaml(tmp_path / "params.yaml", settings)
    with inside(tmp_path):
        check_settings()


def test_a_target_without_stages_is_one_line(
    copy_of_tiny: Copy, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dvc repro` of such a group would run the whole graph."""
    from stages.lib.command.run import run_or_say_why_not
    from stages.tools.targets import main

    folder = copy_of_tiny()
    with_sections(folder, {"train_sft": {"sft": {}}})

    def asked(*targets: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["targets", *targets])
        with inside(folder), pytest.raises(SystemExit) as ended:
            run_or_say_why_not(main)
        return ended.value.code, *capsys.readouterr()

    capsys.readouterr()
    assert asked("train_sft", "report") == (0, "train_sft report\n", "")
    assert asked("train_sft", "train_ppo") == (0, "train_sft\n", "")
    assert asked("train_ppo") == (2, "", "error: params.yaml: train_ppo is empty, so there is nothing to do\n")
    code, _, said = asked("evaluate@ppo", "score_samples@ppo")
    assert code == 2
    assert "evaluate.policies has no 'ppo' and score_samples.policies has no 'ppo'" in said
