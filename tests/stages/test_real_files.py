"""A real pretrained model and real transcripts through every stage: the profile hh-local, cut short."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.lib.settings.sections import default_params
from tests.pipeline.graph import stage_names
from tests.real_files import PROJECT, real_file
from tests.stages.tiny_pipeline import call, change, lay_over, new_project, read_yaml, write_yaml

SHORT = {
    "prepare_data": {"max_rows": 240, "eval_fraction": 0.2},
    "tokenize_data": {"max_length": 256, "max_prompt_length": 160},
    "train_sft": {"sft": {"epochs": 1.0, "batch_size": 16, "eval_every": 100}},
    "train_rm": {"rm": {"epochs": 1.0, "batch_size": 16, "eval_every": 100}},
    "train_dpo": {"dpo": {"epochs": 1.0, "batch_size": 16, "eval_every": 100}},
    "train_ppo": {"ppo": {"iterations": 2, "rollout_batch_size": 8, "minibatch_size": 4, "max_new_tokens": 16}},
    "train_grpo": {"grpo": {"iterations": 2, "rollout_batch_size": 4, "samples_per_prompt": 2, "minibatch_size": 4}}
    | {"max_new_tokens": 16},
    "evaluate": {"max_prompts": 16, "max_new_tokens": 16, "bootstrap_resamples": 200},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, transcripts = real_file("models/stories260K"), real_file("data/hh-rlhf")
    folder = new_project(tmp_path_factory.mktemp("real"))
    settings = default_params()
    lay_over(settings, read_yaml(PROJECT / "profiles/hh-local.yaml"))
    write_yaml(folder / "params.yaml", settings)
    change(folder / "params.yaml", SHORT)
    (folder / "models").mkdir()
    (folder / "models/pretrained").symlink_to(model)
    (folder / "data/raw/hh-rlhf").symlink_to(transcripts)
    for stage in stage_names():
        call(folder, stage)
    return folder


def metrics(folder: Path, name: str) -> dict[str, float]:
    return json.loads((folder / f"metrics/{name}.json").read_text())


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_every_row_is_kept_or_counted(project: Path) -> None:
    counts = metrics(project, "prepare_data")
    kept = counts["preference/train_rows"] + counts["preference/eval_rows"]
    dropped = sum(value for name, value in counts.items() if name.startswith("dropped/"))
    assert kept + dropped == 240


@pytest.mark.slow
def test_no_prompt_is_in_both_splits(project: Path) -> None:
    prompts = {
        split: {
            json.dumps(row["prompt"])
            for kind in ("preference", "prompts")
            for row in rows(project / f"data/prepared/{kind}/{split}.jsonl")
        }
        for split in ("train", "eval")
    }
    assert prompts["train"]
    assert prompts["eval"]
    assert not prompts["train"] & prompts["eval"]


@pytest.mark.slow
def test_fine_tuning_lowers_the_held_out_loss(project: Path) -> None:
    results = metrics(project, "train_sft")
    assert results["validation_loss"] < results["validation_loss_before"]


@pytest.mark.slow
def test_without_a_gold_utility_the_evaluation_is_by_reward(project: Path) -> None:
    results = metrics(project, "evaluate/ppo")
    assert not [name for name in results if name.startswith("gold")]
    assert results["reward_minus_sft_ci_low"] <= results["reward_minus_sft_mean"] <= results["reward_minus_sft_ci_high"]
    assert "gold" not in rows(project / "data/samples/ppo.jsonl")[0]
    assert (project / "metrics/report.html").read_text().count("<table") >= 1
