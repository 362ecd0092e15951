"""Held-out evaluation of a policy trained on its own responses: what it finds, keeps and stops, killed or not."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.compute.processes import Processes
from stages.lib.data.prompts import prompts_of
from stages.lib.data.token_tables import PROMPT_SCHEMA, read_table
from stages.lib.models.pretrained import end_and_pad_ids
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.rl.held_out import STEP
from stages.lib.rl.samplers.own import OwnSampler
from stages.lib.settings.declaration import block
from stages.lib.settings.held_out_metrics import METRICS
from stages.lib.settings.rewards import RepetitionReward
from tests.stages.test_resume import cut_short, outs
from tests.stages.test_training import curve, metrics, weights
from tests.stages.tiny_pipeline import call, change, change_entries, read_yaml, refusal, write_yaml
from tests.tables import rewrite, rollout_rows
from tests.tiny_models import CPU

Copy = Callable[..., Path]
STAGES = ("train_ppo", "train_grpo")
PATIENCE = {"patience": 1, "min_delta": 1000.0}  # more than any evaluation gains: the second one is the last
PROMPTS = 5
# Of so little training the tokens' entropy falls for sure: the first phase has the highest.
BEST = {"keep": "best", "best_by": {"metric": "policy/entropy", "better": "higher"}}


def name_of(stage: str) -> str:
    return stage.removeprefix("train_")


def evaluated(folder: Path, stage: str, values: dict[str, Any] | None = None, **held_out: Any) -> Path:
    """Make it evaluate after each phase, with an average of the weights and steps that are far too long."""
    optimizer = "policy_optimizer" if stage == "train_ppo" else "optimizer"
    changed = {"held_out": {"every": 1, "prompts": PROMPTS, **held_out}, "iterations": 3}
    changed |= {optimizer: {"learning_rate": 0.02, "ema_decay": 0.5}, "save_every": {"steps": 1, "keep_last_k": None}}
    change_entries(folder, {stage: changed | (values or {})})
    return folder


def held_out_rows(folder: Path, stage: str) -> pd.DataFrame:
    return pd.DataFrame(rollout_rows(folder, name_of(stage), "held_out"))


def answers(folder: Path, model: Path) -> list[list[int]]:
    """What a model samples in answer to the prompts of the evaluation, with its random numbers."""
    prompts = prompts_of(read_table(folder / "data/tokens/validation/prompts.arrow", PROMPT_SCHEMA)[:PROMPTS])
    language_model = AutoModelForCausalLM.from_pretrained(model)
    module = TokenLogProbs(language_model, chunk_tokens=64)
    seed = read_yaml(folder / "params.yaml")["seed"]
    ends = end_and_pad_ids(model)
    sizes = MemoryBudget("generation_batch_size", 64)
    sampler = OwnSampler(module, language_model, seed, 1.0, 12, *ends, str, sizes, Processes(0, 1, CPU), by_row=True)
    return [episode.ids for episode in sampler.sample(prompts, STEP)]


@pytest.fixture(scope="module", params=STAGES)
def best(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A stage that has published its best weights, and its folder."""
    folder = copied(tiny, tmp_path_factory.mktemp("best") / "project")
    call(evaluated(folder, request.param, **BEST), request.param)
    return folder, request.param


def copied(tiny: Path, target: Path) -> Path:
    return Path(shutil.copytree(tiny, target, symlinks=True, ignore=shutil.ignore_patterns(".scratch")))


def test_the_best_weights_are_published_and_are_those_that_were_evaluated(best: tuple[Path, str]) -> None:
    folder, stage = best
    name, rows, found = name_of(stage), curve(folder, stage), held_out_rows(folder, stage)
    results = metrics(folder, stage)
    compared = rows["validation/policy/entropy"]
    place = int(compared.idxmax()) + 1
    assert place == 1
    assert (results["kept_iteration"], results["iterations"]) == (place, 3)
    assert results["validation_entropy"] == pytest.approx(compared.max(), rel=1e-6)
    published, kept = weights(folder, name), weights(folder, f"{name}/step_{place}")
    assert published.keys() == kept.keys()
    assert all(torch.equal(published[weight], kept[weight]) for weight in kept)
    of_each = [found[found["iteration"] == phase]["response_ids"].tolist() for phase in (1, 2, 3)]
    assert [answers(folder, folder / f"models/{name}/step_{phase}") for phase in (1, 2, 3)] == of_each
    assert of_each[place - 1] != of_each[2]


def test_a_run_that_was_cut_short_behind_an_evaluation_ends_as_if_it_had_not_been(
    best: tuple[Path, str], copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last phase, so the best weights come from the checkpoint."""
    whole, stage = best
    folder = evaluated(copy_of_tiny(), stage, **BEST)
    change(folder / "runtime.yaml", {"default": {"checkpoint_seconds": 0.0}})
    cut_short(folder, stage, monkeypatch, after=2)
    call(folder, stage)
    assert outs(folder, stage) == outs(whole, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_the_curve_has_the_means_of_the_answers(tiny: Path, stage: str) -> None:
    rows, found, results = curve(tiny, stage), held_out_rows(tiny, stage), metrics(tiny, stage)
    columns = [f"validation/{metric}" for metric in METRICS]
    assert rows.loc[0:1, columns].isna().all().all()  # every fifth of three phases: the last one
    assert set(found["iteration"]) == {3}
    assert found["row"].tolist() == [*range(12)]
    last = rows.loc[2, columns]
    penalties = 2.0 * ~found["ended"]
    kl = found["kl"].mean()
    rewards = (found["score"] - penalties).mean()
    lengths = found["response_ids"].map(len)
    expected = [found["score"].mean(), rewards, rewards - 0.05 * kl, kl, lengths.mean(), found["ended"].mean()]
    assert last.tolist()[:6] == pytest.approx(expected, abs=2e-6)
    assert results["validation_kl"] == pytest.approx(kl, abs=2e-6)
    assert results["kept_iteration"] == 3


def test_evaluating_changes_no_weight(tiny: Path, copy_of_tiny: Copy) -> None:
    folder, stage = copy_of_tiny(), "train_ppo"
    change_entries(folder, {stage: {"held_out": None}})
    call(folder, stage)
    name = name_of(stage)
    ours, theirs = weights(folder, name), weights(tiny, name)
    assert all(torch.equal(ours[weight], theirs[weight]) for weight in theirs)
    assert not (folder / f"data/rollouts/{name}/held_out.parquet").exists()
    assert not [column for column in curve(folder, stage) if column.startswith("validation/")]


def test_one_of_several_rewards_may_say_what_is_best(copy_of_tiny: Copy, capsys: pytest.CaptureFixture) -> None:
    folder = evaluated(copy_of_tiny(), "train_grpo", {"iterations": 1})
    params = read_yaml(folder / "params.yaml")
    entry = params["train_grpo"]["grpo"]
    entry["rewards"] = {"repeats": block(RepetitionReward, n=1, weight=0.0)}
    entry["held_out"]["best_by"] = {"metric": "rewards/repeat", "better": "higher"}
    write_yaml(folder / "params.yaml", params)
    message = refusal(folder, "train_grpo", capsys)
    assert "train_grpo.grpo.held_out.best_by.metric: there is no metric 'rewards/repeat' here" in message
    assert "did you mean 'rewards/repeats'" in message
    entry["held_out"]["best_by"]["metric"] = "rewards/repeats"
    write_yaml(folder / "params.yaml", params)
    call(folder, "train_grpo")
    shares = [1 - len(set(ids)) / len(ids) for ids in held_out_rows(folder, "train_grpo")["response_ids"]]
    mean = -sum(shares) / len(shares)
    assert curve(folder, "train_grpo")["validation/rewards/repeats"][0] == pytest.approx(mean, abs=1e-6)
    assert metrics(folder, "train_grpo")["validation_rewards_repeats"] == pytest.approx(mean, abs=1e-6)


def test_each_source_has_its_own_mean(copy_of_tiny: Copy) -> None:
    """Of validation prompts that are said to come from two."""
    folder = evaluated(copy_of_tiny(), "train_grpo", {"iterations": 1})
    path = folder / "data/tokens/validation/prompts.arrow"
    rewrite(path, PROMPT_SCHEMA, lambda columns: columns | {"source": ["one", "two"] * (len(columns["row"]) // 2)})
    call(folder, "train_grpo")
    found, row, results = (
        held_out_rows(folder, "train_grpo"),
        curve(folder, "train_grpo").loc[0],
        metrics(folder, "train_grpo"),
    )
    assert found["source"].value_counts().to_dict() == {"one": 3, "two": 2}
    for source, rows in found.groupby("source"):
        assert row[f"validation/rewards/reward_model/{source}"] == pytest.approx(rows["score"].mean(), abs=1e-6)
        assert results[f"validation_rewards_reward_model_{source}"] == pytest.approx(rows["score"].mean(), abs=1e-6)


def test_evaluations_differ_by_the_weights_alone(copy_of_tiny: Copy) -> None:
    folder = evaluated(copy_of_tiny(), "train_ppo", {"critic_warmup_iterations": 2, "iterations": 3})
    call(folder, "train_ppo")
    found = held_out_rows(folder, "train_ppo").drop(columns="iteration")
    first, second, third = (found[start : start + PROMPTS].to_dict("records") for start in (0, PROMPTS, 2 * PROMPTS))
    assert first == second
    assert first != third


@pytest.mark.parametrize("best", ["train_grpo"], indirect=True)
def test_patience_ends_training_with_the_rates_of_the_plan_killed_or_not(
    best: tuple[Path, str], copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Cut short behind the evaluation that ends it, and once more when all that is left is to publish."""
    whole, stage = best
    folder = evaluated(copy_of_tiny(), stage, early_stopping=PATIENCE)
    change(folder / "runtime.yaml", {"default": {"checkpoint_seconds": 0.0}})
    cut_short(folder, stage, monkeypatch, after=1)
    cut_short(folder, stage, monkeypatch, after=0, method="publish")
    said = capsys.readouterr().out
    assert f"{stage}@{name_of(stage)}: stops after phase 2 of 3: validation/objective/rlhf_reward has not" in said
    call(folder, stage)
    rows, results = curve(folder, stage), metrics(folder, stage)
    pd.testing.assert_frame_equal(rows, curve(whole, stage)[:2])
    assert (results["iterations"], results["stopped_early"], results["kept_iteration"]) == (2, 1, 2)
    second = f"{name_of(stage)}/step_2"
    ours, theirs = weights(folder, name_of(stage)), weights(whole, second)
    assert all(torch.equal(ours[weight], theirs[weight]) for weight in theirs)
    assert not (folder / "models" / second).exists()  # it is published, and so no model of the way
    assert (folder / f"models/{name_of(stage)}/step_1").exists()
