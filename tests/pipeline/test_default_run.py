"""The committed metrics of the default run keep what the README promises of it."""

import json
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


def metrics(name: str) -> dict[str, float]:
    return json.loads((PROJECT / "metrics" / f"{name}.json").read_text())


def test_the_reward_model_is_about_five_points_below_the_best_possible_accuracy() -> None:
    """Of 1,500 pairs the interval reaches 2.2 points up, and rounding alone has moved the accuracy by 0.7."""
    assert metrics("evaluate_rm/rm")["accuracy_ci_high"] >= metrics("prepare_data")["bayes_accuracy"] - 0.05


def test_fine_tuning_lowers_the_held_out_loss() -> None:
    sft = metrics("training/sft")
    assert sft["validation_loss"] < 0.5 * sft["validation_loss_before"]


@pytest.mark.parametrize("policy", ["dpo", "ppo", "grpo"])
def test_alignment_beats_fine_tuning_on_the_gold_utility(policy: str) -> None:
    evaluation = metrics(f"evaluate/{policy}")
    assert evaluation["gold_minus_reference_ci_low"] > 0
    assert evaluation["gold_win_rate_vs_reference"] >= 0.65
    assert evaluation["eos_rate"] >= 0.95
    assert evaluation["kl_to_reference_mean"] > 0


def test_fine_tuning_is_compared_with_nothing_as_it_is_the_reference_itself() -> None:
    assert [name for name in metrics("evaluate/sft") if "reference" in name] == []


def test_the_readme_gives_the_figures_of_the_committed_metrics() -> None:
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    table = [line.strip("| ").split(" | ") for line in readme.splitlines()]
    rows = {row[0]: row for row in table if row[0] in ("SFT", "DPO", "PPO", "GRPO") and len(row) == 6}
    for name, row in rows.items():
        of = metrics(f"evaluate/{name.lower()}")
        gold, eos = f"{of['gold_mean']:.2f}", f"{of['eos_rate']:.1%}".replace("%", " %")
        others = ["–"] * 3
        if name != "SFT":
            difference, low, high = (of[f"gold_minus_reference_{end}"] for end in ("mean", "ci_low", "ci_high"))
            wins = f"{of['gold_win_rate_vs_reference']:.1%}".replace("%", " %")
            others = [f"{difference:+.2f} ({low:+.2f} to {high:+.2f})", wins, f"{of['kl_to_reference_mean']:.2f}"]
        assert row == [name, gold, *others, eos]
    assert len(rows) == 4
