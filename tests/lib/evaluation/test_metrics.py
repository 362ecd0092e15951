"""Metrics of responses and pairs, worked by hand on four prompts and four pairs."""

import math
from dataclasses import replace

import pytest

from stages.lib.data.prompts import Prompt
from stages.lib.evaluation.intervals import paired_bootstrap_interval, wilson_interval
from stages.lib.evaluation.metrics import (
    OF_RESPONSES,
    Responses,
    implicit_margins,
    pair_metrics,
    response_metrics,
    sample_records,
)

EOS = 0
SFT = Responses(
    ids=[[5, EOS], [5, 6], [7, EOS], [8, EOS]],
    texts=["a", "ab", "c", "d"],
    ended=[True, False, True, True],
    rewards=[0.0, 1.0, 2.0, 3.0],
    kl=[0.0] * 4,
    grades=[1.0, 1.0, 1.0, 1.0],
)
OWN = Responses(
    ids=[[5, 5, EOS], [5, 5, EOS], [6, 5, 5, 5], [EOS]],
    texts=["aa", "aa", "baaa", ""],
    ended=[True, True, False, True],
    rewards=[1.0, 1.0, 1.0, 5.0],
    kl=[0.5, 1.5, -1.0, 3.0],
    grades=[3.0, 1.0, 0.0, 4.0],
)


def interval(name, low_high):
    return dict(zip((f"{name}_ci_low", f"{name}_ci_high"), low_high, strict=True))


def test_responses_beside_those_of_sft():
    results = response_metrics(OWN, SFT, resamples=200, seed=3)
    expected = {
        "prompts": 4,
        "reward_mean": 2.0,
        "reward_minus_sft_mean": 0.5,  # differences 1, 0, -1, 2
        **interval("reward_minus_sft", paired_bootstrap_interval([1.0, 0.0, -1.0, 2.0], 3, 200)),
        "reward_win_rate_vs_sft": 2.5 / 4,  # two wins and a tie
        **interval("reward_win_rate_vs_sft", wilson_interval(2.5, 4)),
        "gold_mean": 2.0,
        "gold_minus_sft_mean": 1.0,  # differences 2, 0, -1, 3
        **interval("gold_minus_sft", paired_bootstrap_interval([2.0, 0.0, -1.0, 3.0], 3, 200)),
        "gold_win_rate_vs_sft": 2.5 / 4,
        **interval("gold_win_rate_vs_sft", wilson_interval(2.5, 4)),
        "kl_to_sft_mean": 1.0,
        **interval("kl_to_sft", paired_bootstrap_interval(OWN.kl, 3, 200)),
        "eos_rate": 0.75,
        "length_mean": 11 / 4,
        "distinct_1": 3 / 11,  # 5, 6 and EOS
        "distinct_2": 3 / 7,  # 5 5, 5 EOS, 6 5
    }
    assert results == pytest.approx(expected)
    assert list(results) == list(expected)


def test_a_metric_of_responses_is_an_entry_in_the_table(monkeypatch):
    monkeypatch.setitem(OF_RESPONSES, "empty_rate", lambda responses: sum(not text for text in responses.texts) / 4)
    assert response_metrics(OWN, SFT, 200, 3)["empty_rate"] == 0.25


def test_without_tasks_there_is_no_grade():
    own, sft = (replace(responses, grades=[None] * 4) for responses in (OWN, SFT))
    results = response_metrics(own, sft, 200, 3)
    whole = response_metrics(OWN, SFT, 200, 3)
    assert results == {name: value for name, value in whole.items() if not name.startswith("gold")}
    assert not any({"gold", "sft_gold"} & record.keys() for record in sample_records(PROMPTS, own, sft))


def test_with_tasks_in_a_part_of_the_prompts_grades_are_over_that_part():
    own = replace(OWN, grades=[None, 1.0, None, 4.0])
    sft = replace(SFT, grades=[None, 1.0, None, 1.0])
    results = response_metrics(own, sft, 200, 3)
    assert results["gold_prompts"] == 2
    assert results["gold_mean"] == 2.5
    assert results["gold_minus_sft_mean"] == 1.5
    assert results["gold_win_rate_vs_sft"] == 0.75
    assert results["gold_win_rate_vs_sft_ci_low"] == pytest.approx(wilson_interval(1.5, 2)[0])
    assert results["reward_mean"] == 2.0
    records = sample_records(PROMPTS, own, sft)
    assert [record.get("gold") for record in records] == [None, 1.0, None, 4.0]
    assert ["sft_gold" in record for record in records] == [False, True, False, True]


PROMPTS = [Prompt(row, [1], [{"role": "user", "content": f"{row}?"}], {"task": "sums"}) for row in (2, 3, 5, 8)]


def test_samples_show_prompt_and_both_responses():
    own = replace(OWN, rewards=[1.00000049, 1.0, 1.0, 5.0])
    records = sample_records(PROMPTS, own, SFT)
    assert records[0] == {
        "row": 2,
        "prompt": [{"role": "user", "content": "2?"}],
        "response": "aa",
        "reward": 1.0,
        "kl": 0.5,
        "length": 3,
        "ended": True,
        "sft_response": "a",
        "sft_reward": 0.0,
        "gold": 3.0,
        "sft_gold": 1.0,
    }
    assert [record["row"] for record in records] == [2, 3, 5, 8]


def test_pairs():
    results = pair_metrics([2.0, 1.0, 0.0, 3.0], [0.0, 1.0, 1.0, 2.0], [0.5, -0.5, 1e-4, 2e-3])
    # Margins 2, 0, -1, 1: two right, a tie. Confidence of the own pick: p, 0.5, p', p' with p' = sigmoid(1).
    sure, less = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    gaps = [abs(1 - sure), abs(0 - 0.5), abs(1 - 2 * less)]  # in three bins; the last holds a right and a wrong pick
    assert results == pytest.approx(
        {
            "preference_accuracy": 2.5 / 4,  # the third is a tie within 1e-3, the fourth is none
            **interval("preference_accuracy", wilson_interval(2.5, 4)),
            "rm_accuracy": 2.5 / 4,
            **interval("rm_accuracy", wilson_interval(2.5, 4)),
            "rm_calibration_error": sum(gaps) / 4,
            "preference_pairs": 4,
        }
    )


def test_implicit_margins_are_differences_of_differences():
    assert implicit_margins([-1.0, -2.0], [-3.0, -1.0], [-2.0, -2.0], [-2.5, -1.5]) == [2.0 - 0.5, -1.0 + 0.5]
