import json

import pytest

from stages.lib.command.errors import StageError
from stages.lib.settings.sections import build_all, default_params
from stages.tools.repeat_seeds import commits_of, measured_in, printed_lines, repeated_policies, seeds_table


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository in which seed 18 was run, as DVC keeps an experiment: a commit with a ref below that of HEAD."""
    monkeypatch.chdir(tmp_path)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "someone")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "someone@example.org")
    printed_lines("git", "init", "--quiet")
    printed_lines("git", "commit", "--quiet", "--allow-empty", "-m", "first")
    (head,) = printed_lines("git", "rev-parse", "HEAD")
    for stage, values in {"evaluate": {"gold_mean": 1.25}, "score_samples": {"reward_mean": 0.5}}.items():
        (tmp_path / "metrics" / stage).mkdir(parents=True)
        (tmp_path / "metrics" / stage / "ppo.json").write_text(json.dumps(values, indent=2))
    printed_lines("git", "add", "metrics")
    tree = printed_lines("git", "write-tree")[0]
    commit = printed_lines("git", "commit-tree", tree, "-p", head, "-m", "experiment")[0]
    printed_lines("git", "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/seeds-18", commit)


@pytest.mark.usefixtures("project")
def test_metrics_are_read_from_the_experiment_of_this_commit():
    assert measured_in(18, "ppo") == {"evaluate/gold_mean": 1.25, "score_samples/reward_mean": 0.5}
    assert commits_of(19) == []
    printed_lines("git", "commit", "--quiet", "-m", "second")
    assert commits_of(18) == []  # it was of the commit before


@pytest.mark.usefixtures("project")
def test_a_command_that_fails_is_one_line():
    with pytest.raises(StageError, match=r"git rev-parse nothing failed: fatal: ambiguous argument 'nothing'"):
        printed_lines("git", "rev-parse", "nothing")


def test_policies_that_are_trained_with_a_seed():
    document = default_params()
    document["evaluate"]["policies"] |= {"second": "models/grpo/", "given": "models/elsewhere"}
    params = build_all(document, "params.yaml")
    found = {name: f"train_{name}.{name}" for name in ("dpo", "ppo", "grpo")}
    assert repeated_policies(params) == found | {"second": "train_grpo.grpo"}


def test_the_table_by_hand():
    """Of 1 and 3 the mean is 2; the deviation √2 over √2, times 12.706, t of one degree of freedom."""
    measured = {
        "dpo": [{"evaluate/gold_mean": 1.0}, {"evaluate/gold_mean": 3.0}],
        "ppo": [{"evaluate/gold_mean": 2.0, "score_samples/reward_mean": 0.5}] * 2,
    }
    assert seeds_table(measured).splitlines() == [
        "| policy, 2 seeds | gold utility | reward |",
        "|---|---|---|",
        "| dpo | 2.00 ± 12.71 | – |",
        "| ppo | 2.00 ± 0.00 | 0.50 ± 0.00 |",
    ]
