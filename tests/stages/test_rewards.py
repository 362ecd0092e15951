"""Rewards of an entry beside its reward model, or instead of one, by the real scripts."""

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from stages.code_manifest import manifests
from stages.lib.command.errors import StageError
from stages.lib.operations.code_closure import code_hash
from stages.lib.rl.learner import Learner
from stages.lib.settings.advantages import Gdpo
from stages.lib.settings.check import check_settings
from stages.lib.settings.critic import SeparateCritic
from stages.lib.settings.declaration import block
from stages.lib.settings.ensemble_member import EnsembleMember
from stages.lib.settings.reward_part import RowsWhere
from stages.lib.settings.rewards import CosineLengthReward, FormatReward, FunctionReward, MathReward, RepetitionReward
from tests.stages.test_resume import outs
from tests.stages.test_training import curve
from tests.stages.tiny_pipeline import call, change, inside, new_project, read_yaml, refusal, write_yaml
from tests.tables import rollout_rows

Copy = Callable[..., Path]
OWN = """
import packaging
from pathlib import Path
from rewards.shared import WORTH

def film(completion, facts):
    assert facts["task"] == "film_reviews"
    return WORTH * completion.count(" ")

def later(completion):
    # from the ninth response on, while there is a file
    with Path("seen").open("a") as seen:  # by several processes
        is_second_phase = seen.tell() >= 8
        seen.write("x")
    if is_second_phase and Path("fail").exists():
        raise OSError("the second phase fails")
    return len(completion)

def broken(completion):
    raise ValueError(completion[:5])
"""


def function(name: str, **changed: Any) -> dict[str, Any]:
    return block(FunctionReward, **{"path": f"rewards/own.py:{name}", **changed})


def with_own_functions(folder: Path) -> Path:
    (folder / "rewards").unlink()
    (folder / "rewards").mkdir()
    (folder / "rewards/own.py").write_text(OWN)
    (folder / "rewards/shared.py").write_text("WORTH = 0.25\n")
    return folder


def with_rewards(folder: Path, section: str, **changed: Any) -> None:
    params = read_yaml(folder / "params.yaml")
    (entry,) = params[section].values()
    assert changed.keys() <= entry.keys()
    entry.update(changed)
    write_yaml(folder / "params.yaml", params)


def rollouts_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return rollout_rows(folder, name)


def worth(text: str) -> float:
    return 0.25 * text.count(" ")


def test_grpo_without_a_reward_model_is_paid_by_functions(copy_of_tiny: Copy) -> None:
    folder = with_own_functions(copy_of_tiny())
    rewards = {
        "film": function("film", weight=2.0),
        "repeats": block(RepetitionReward, n=1, weight=0.0),
        "other": function("broken", where=block(RowsWhere, fact="task", value="sums")),
    }
    with_rewards(folder, "train_grpo", reward_model="models/sft", rewards=rewards, iterations=1)
    call(folder, "train_grpo")
    rows, rollouts = curve(folder, "train_grpo"), rollouts_of(folder, "grpo")
    assert len(rollouts) == 8
    mean = sum(rollout["score"] for rollout in rollouts) / 8
    assert rows["objective/scores"][0] == pytest.approx(mean, abs=1e-5)
    assert rows["rewards/film"][0] == pytest.approx(mean / 2, abs=1e-5)
    assert -1 < rows["rewards/repeats"][0] < 0
    assert rows["rewards/other"].isna().all()
    assert rows["reward_errors/film"].tolist() == [0]
    assert "rewards/reward_model" not in rows
    record = json.loads((folder / ".scratch/runs.jsonl").read_text().splitlines()[-1])
    assert record["versions"]["packaging"] == version("packaging")  # which the function alone has imported


def test_ppo_without_a_reward_model_stops_at_a_function_that_fails(
    copy_of_tiny: Copy, capsys: pytest.CaptureFixture
) -> None:
    folder = with_own_functions(copy_of_tiny())
    changed = {"reward_model": "models/sft", "critic": block(SeparateCritic, path="models/sft"), "iterations": 1}
    with_rewards(folder, "train_ppo", **changed, rewards={"own": function("broken")})
    said = refusal(folder, "train_ppo", capsys)
    assert "of the prompts, response" in said
    assert ": the reward own fails: ValueError: " in said
    assert "(rewards/own.py, line " in said
    with_rewards(folder, "train_ppo", rewards={"own": function("film"), "bad": function("broken", missing="skip")})
    call(folder, "train_ppo")
    rows = curve(folder, "train_ppo")
    assert rows["rewards/own"][0] == pytest.approx(rows["objective/scores"][0])
    assert (rows["reward_errors/bad"][0], rows["reward_timeouts/bad"][0]) == (8, 0)


def test_an_ensemble_scores_as_the_weighted_sum_of_its_members(
    copy_of_tiny: Copy, capsys: pytest.CaptureFixture
) -> None:
    """Of two that are the same model; the first phase's responses are those of the default run."""
    folder = copy_of_tiny()
    alone = [rollout["score"] for rollout in rollouts_of(folder, "grpo")[:8]]
    params = read_yaml(folder / "params.yaml")
    for name, weight in (("one", 0.5), ("two", 0.25)):
        params["ensemble_member"][name] = block(EnsembleMember, weight=weight)
    write_yaml(folder / "params.yaml", params)
    for name in ("one", "two"):
        call(folder, f"ensemble_member@{name}")
    with_rewards(folder, "train_grpo", reward_model="data/ensembles/judges", reward_model_weight=2.0, iterations=1)
    with_rewards(folder, "train_grpo", advantages=block(Gdpo))  # which takes the members one by one
    with inside(folder):
        assert check_settings() == []
        Path("data/ensembles/judges/old.json").write_text("{}")
        with pytest.raises(StageError, match=r"judges/old\.json is of no entry of ensemble_member"):
            check_settings()
        Path("data/ensembles/judges/old.json").unlink()
    call(folder, "train_grpo")
    rows, rollouts = curve(folder, "train_grpo"), rollouts_of(folder, "grpo")
    assert [rollout["score"] for rollout in rollouts] == pytest.approx([1.5 * score for score in alone], abs=2e-6)
    assert rows["rewards/one"][0] == rows["rewards/two"][0] == pytest.approx(sum(alone) / 8, abs=1e-5)
    (folder / "models/rm/config.json").write_text((folder / "models/rm/config.json").read_text() + "\n")
    with_rewards(folder, "train_grpo", seed=3)
    said = refusal(folder, "train_grpo", capsys)
    assert said.endswith("one.json: models/rm is not the model that it was; run ensemble_member@one again")


@pytest.mark.parametrize(
    ("section", "changed", "message"),
    [
        ("train_grpo", {"standardise_reward": True}, "are those of each member of an ensemble"),
        ("train_grpo", {"rewards": {"one": function("film")}}, "a member of the ensemble has that name"),
        ("evaluate_rm", {}, "expected a reward model, and data/ensembles/judges, which"),
    ],
)
def test_what_an_ensemble_is_not_for(project: Path, section: str, changed: dict[str, Any], message: str) -> None:
    params = read_yaml(project / "params.yaml")
    params["ensemble_member"] = {"one": block(EnsembleMember)}
    write_yaml(project / "params.yaml", params)
    with_rewards(project, section, reward_model="data/ensembles/judges", **changed)
    with inside(project), pytest.raises(StageError, match=message):
        check_settings()


def test_rewards_judge_policies_and_the_report_says_so(copy_of_tiny: Copy) -> None:
    """Without a reward model: what the policies are compared by is what a function says of their replies."""
    folder = with_own_functions(copy_of_tiny())
    rewards = {
        "film": function("film", weight=2.0),
        "none": function("broken", where=block(RowsWhere, fact="task", value="sums")),
        "failing": function("broken", missing="skip", weight=0.0),
    }
    change(folder / "params.yaml", {"score_samples": {"policies": [], "reward_model": None}})
    params = read_yaml(folder / "params.yaml")
    params["evaluate"] |= {"rewards": rewards, "policies": {"grpo": "models/grpo"}}
    params["evaluate"]["pass_at_k"] = {"samples": 3, "k": [1, 3], "temperature": 1.0, "above": 0.0}
    write_yaml(folder / "params.yaml", params | {"train_rm": {}, "train_dpo": {}, "train_ppo": {}, "evaluate_rm": {}})
    call(folder, "evaluate@grpo")
    found = json.loads((folder / "metrics/evaluate/grpo.json").read_text())
    samples = [json.loads(line) for line in (folder / "data/samples/grpo.jsonl").open(encoding="utf-8")]
    own, theirs = [[worth(sample[f"{side}response"]) for sample in samples] for side in ("", "reference_")]
    assert [sample["rewards"]["film"] for sample in samples] == own
    mean, difference = sum(own) / len(own), (sum(own) - sum(theirs)) / len(own)
    assert found["reward_of_film_mean"] == pytest.approx(mean)
    assert found["reward_of_sum_mean"] == pytest.approx(2 * mean)
    assert found["reward_of_film_minus_reference_mean"] == pytest.approx(difference)
    assert found["reward_of_failing_errors"] == len(samples)
    assert found["reward_of_failing_mean"] == 0  # as in training
    assert found["reward_of_failing_pass_at_3"] == 0
    assert found["reward_of_film_pass_at_3"] >= found["reward_of_film_pass_at_1"]
    assert "gold_pass_at_1" in found
    assert "reward_of_none_pass_at_1" not in found
    assert "reward_of_none_mean" not in found
    for gone in (
        *folder.glob("metrics/*/ppo.*"),
        *folder.glob("metrics/*/dpo.*"),
        *folder.glob("metrics/*/rm.*"),
        *folder.glob("metrics/evaluate/sft.*"),
    ):
        gone.unlink()
    call(folder, "report")
    page = (folder / "metrics/report.html").read_text()
    assert "<th>film</th>" in page.replace(' scope="col"', "")


def test_a_reward_that_fails_loses_no_finished_phase(copy_of_tiny: Copy, capsys: pytest.CaptureFixture) -> None:
    """The run goes on where it stopped, also if no checkpoint was due before."""
    folder = with_own_functions(copy_of_tiny())
    rewards = {"film": function("film"), "once": function("later", weight=0.0)}
    with_rewards(folder, "train_grpo", reward_model="models/sft", rewards=rewards, iterations=2)
    (folder / "fail").touch()
    assert "OSError: the second phase fails" in refusal(folder, "train_grpo", capsys)
    (folder / "fail").unlink()
    capsys.readouterr()
    call(folder, "train_grpo")
    assert "step 1" in capsys.readouterr().out
    resumed = rollouts_of(folder, "grpo")
    assert [rollout["iteration"] for rollout in resumed] == [1] * 8 + [2] * 8
    shutil.rmtree(folder / ".scratch")
    (folder / "seen").unlink()
    call(folder, "train_grpo")
    assert rollouts_of(folder, "grpo") == resumed


@pytest.mark.parametrize("stage", ["train_ppo", "train_grpo"])
def test_a_reward_that_fails_in_a_held_out_evaluation_costs_no_phase(
    copy_of_tiny: Copy, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """It is asked for 8 responses in each phase, and the evaluation follows the first one, of averaged weights."""
    name, folder = stage.removeprefix("train_"), with_own_functions(copy_of_tiny())
    optimizer = "policy_optimizer" if name == "ppo" else "optimizer"
    change(folder / "params.yaml", {stage: {name: {optimizer: {"ema_decay": 0.5}, "held_out": {"every": 1}}}})
    with_rewards(folder, stage, rewards={"later": function("later")}, iterations=2)
    (folder / "fail").touch()
    for _ in range(2):  # once more, and what was computed is still there
        assert "OSError: the second phase fails" in refusal(folder, stage, capsys)
    (folder / "fail").unlink()
    updates = []
    whole = Learner.update
    monkeypatch.setattr(Learner, "update", lambda own, rows: (updates.append(own.name), whole(own, rows))[1])
    call(folder, stage)
    assert updates.count("policy") == 4  # those of the second phase
    ours = outs(folder, stage)
    shutil.rmtree(folder / ".scratch")
    call(folder, stage)
    assert outs(folder, stage) == ours
    assert curve(folder, stage)["validation/rewards/later"].notna().all()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return with_own_functions(new_project(tmp_path))


def test_a_function_and_what_it_imports_are_in_the_manifests_of_those_who_call_it(project: Path) -> None:
    with inside(project):
        before = manifests()
        with_rewards(project, "train_grpo", rewards={"own": function("film")})
        after = manifests()
        assert {name for name, text in after.items() if text != before[name]} == {"train_grpo"}
        more = set(after["train_grpo"].splitlines()) - set(before["train_grpo"].splitlines())
        files = ("rewards/own.py", "rewards/shared.py")
        assert more == {f"{code_hash(project / file)} {file}" for file in files}
        assert check_settings() == []


def test_a_file_that_a_function_reads_is_part_of_its_code(project: Path) -> None:
    words = project / "rewards/lists/words.txt"
    with_rewards(project, "train_grpo", rewards={"own": function("film", files=["rewards/lists/words.txt"])})
    with (
        inside(project),
        pytest.raises(StageError, match=r"rewards\.own\.files: the file rewards/lists/words\.txt does not"),
    ):
        check_settings()
    words.parent.mkdir()
    found = []
    for text in ("one", "one", "two"):
        words.write_text(text)
        with inside(project):
            assert check_settings() == []
            found.append({name: text for name, text in manifests().items() if "rewards/lists/words.txt" in text})
    assert [*found[0]] == ["train_grpo"]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("code", "message"),
    [("def film(:", "is no Python"), ("import stages.lib.tasks.film_gold", "imports stages/lib/tasks/film_gold.py")],
)
def test_a_module_among_the_files_is_looked_into(project: Path, code: str, message: str) -> None:
    (project / "rewards/read.py").write_text(code)
    with_rewards(project, "train_grpo", rewards={"own": function("film", files=["rewards/read.py"])})
    with inside(project), pytest.raises(StageError, match=f"rewards.own.files: .*{message}"):
        check_settings()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("from stages.lib.tasks.film_gold import gold_utility as film", "imports stages/lib/tasks/film_gold.py, which"),
        ("from rewards.other import film", "imports stages/lib/tasks/"),
        ("def film(:", "is no Python"),
        (None, "the file rewards/own.py does not exist"),
    ],
)
def test_the_gold_utility_is_no_reward(project: Path, code: str | None, message: str) -> None:
    """It exists to measure what training does."""
    (project / "rewards/other.py").write_text("import stages.lib.tasks.table\nfilm = None\n")
    (project / "rewards/own.py").unlink() if code is None else (project / "rewards/own.py").write_text(code)
    with_rewards(project, "train_ppo", rewards={"own": function("film")})
    with inside(project), pytest.raises(StageError) as said:
        check_settings()
    assert str(said.value).startswith("params.yaml: train_ppo.ppo.rewards.own.path: ")
    assert message in str(said.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reward_model": "models/sft"}, "names model itself, so that none takes part; then rewards must have one"),
        (
            {"reward_model": "models/sft", "reward_label": 1, "rewards": {"own": function("film")}},
            "set reward_head, reward_label and reward_model_where to null",
        ),
        ({"reward_model_weight": 0.0}, "reward_model_weight is 0, so rewards must have one of a weight"),
        ({"rewards": {"reward_model": function("film")}}, "rewards must not have the name reward_model"),
        ({"rewards": {"own": function("film", path="../own.py:film")}}, "rewards.own.path"),
        ({"rewards": {"own": function("film", files=["rewards/../params.yaml"])}}, "rewards.own.files"),
        ({"rewards": {"own": function("film", files=["data/words.txt"])}}, "rewards.own.files"),
        ({"rewards": {"own": {"type": "function", "pattern": "x"}}}, "rewards.own"),
        ({"rewards": {"length": {"type": "cosine_length"}}}, "rewards.length"),
        (
            {"rewards": {"length": block(CosineLengthReward)}},
            "rewards.length.judged_by must name a reward of another type, and answer is none",
        ),
        ({"rewards": {"form": block(FormatReward, pattern="(")}}, "'(' is no regular expression: missing )"),
        ({"rewards": {"right": block(MathReward, read="after")}}, "rewards.right: read: after needs answer_after"),
    ],
)
def test_rewards_that_cannot_be_obeyed_are_named(project: Path, changed: dict[str, Any], message: str) -> None:
    with_rewards(project, "train_grpo", **changed)
    with inside(project), pytest.raises(StageError) as said:
        check_settings()
    assert str(said.value).startswith("params.yaml: train_grpo")
    assert message in str(said.value)


def test_a_pipeline_may_have_no_reward_model_at_all(project: Path) -> None:
    rewards = {"own": function("film")}
    with_rewards(project, "train_grpo", reward_model="models/sft", rewards=rewards)
    critic = block(SeparateCritic, path="models/sft")
    with_rewards(project, "train_ppo", reward_model="models/sft", critic=critic, rewards=rewards)
    params = read_yaml(project / "params.yaml") | {"train_rm": {}, "evaluate_rm": {}}
    write_yaml(project / "params.yaml", params)
    change(project / "params.yaml", {"score_samples": {"policies": [], "reward_model": None}})
    with inside(project):
        assert check_settings() == []
