"""The profile arithmetic, made tiny, through the real scripts: two sources of one task, one of them only measured."""

import json
from pathlib import Path

import pandas as pd
import pytest

from stages.lib.command.jsonl import read_jsonl
from stages.lib.tasks.arithmetic import MARK
from stages.tools.use_profile import settings_of
from tests.stages.tiny_pipeline import PROJECT, call, lay_over, new_project, write_yaml
from tests.tables import rollout_rows

SIZES = {"validation_rows": 4, "test_rows": 6}
SMALL = {"hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 1, "key_value_heads": 1}
STAGES = (
    *("read_source_arithmetic@arithmetic", "read_source_arithmetic@harder", "prepare_data", "prepare_base@base"),
    *("tokenize_data@sft", "tokenize_data@prompts", "train_sft@sft", "train_grpo@grpo", "evaluate@grpo"),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = new_project(tmp_path_factory.mktemp("arithmetic"))
    settings = settings_of(PROJECT / "profiles/arithmetic.yaml")
    lay_over(settings["sources"]["arithmetic"]["arithmetic"], {"sft_rows": 8, "prompt_rows": 8, **SIZES})
    lay_over(settings["sources"]["arithmetic"]["harder"], {"test_rows": 5})
    lay_over(settings["prepare_base"]["scratch"]["base"], SMALL)
    lay_over(settings["train_sft"]["sft"], {"epochs": 1.0, "batch_size": 8})
    size = {"rollout_batch_size": 4, "samples_per_prompt": 2, "minibatch_size": 8, "iterations": 1, "held_out": None}
    lay_over(settings["train_grpo"]["grpo"], size | {"max_new_tokens": 12})
    lay_over(settings["evaluate"], {"max_new_tokens": 12, "bootstrap_resamples": 100})
    write_yaml(folder / "params.yaml", settings)
    for stage in STAGES:
        call(folder, stage)
    return folder


def answer_of(prompt: list[dict]) -> str:
    question = prompt[0]["content"].removeprefix("larger: ").removesuffix("=?").removesuffix("?")
    return str(max(sum(map(int, side.split("+"))) for side in question.split(" or ")))


def right(prompt: list[dict], response: str) -> float:
    _, found, after = response.partition(MARK)
    return float(bool(found) and after.strip() == answer_of(prompt))


def test_rollouts_are_of_the_source_that_has_train_prompts(project: Path) -> None:
    rows = rollout_rows(project, "grpo")
    assert [row["source"] for row in rows] == ["arithmetic"] * 8
    curve = pd.read_csv(project / "metrics/curves/grpo.csv")
    assert curve["objective/scores"].tolist() == [sum(row["score"] for row in rows) / 8]


def test_both_sources_are_measured_by_the_grade_and_by_the_verifier(project: Path) -> None:
    results = json.loads((project / "metrics/evaluate/grpo.json").read_text())
    samples = list(read_jsonl(project / "data/samples/grpo.jsonl"))
    assert [sample["source"] for sample in samples] == ["arithmetic"] * 6 + ["harder"] * 5
    for sample in samples:
        grade = right(sample["prompt"], sample["response"])
        assert sample["gold"] == grade
        assert sample["rewards"] == {"answer": grade * sample["ended"]}
    for source in ("", "/arithmetic", "/harder"):
        assert 0 <= results[f"reward_of_answer_mean{source}"] <= results[f"gold_mean{source}"] <= 1
