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
    preference_metrics,
    response_metrics,
    sample_records,
    score_metrics,
    text_metrics,
    with_sources,
)

EOS = 0
REFERENCE = Responses(
    ids=[[5, EOS], [5, 6], [7, EOS], [8, EOS]],
    texts=["a", "ab", "c", "d"],
    ended=[True, False, True, True],
    kl=[0.0] * 4,
    grades=[1.0, 1.0, 1.0, 1.0],
)
OWN = Responses(
    ids=[[5, 5, EOS], [5, 5, EOS], [6, 5, 5, 5], [EOS]],
    texts=["aa", "aa", "baaa", ""],
    ended=[True, True, False, True],
    kl=[0.5, 1.5, -1.0, 3.0],
    grades=[3.0, 1.0, 0.0, 4.0],
)


def interval(name, low_high):
    return dict(zip((f"{name}_ci_low", f"{name}_ci_high"), low_high, strict=True))


def test_responses_beside_those_of_the_reference():
    results = response_metrics(OWN, REFERENCE, resamples=200, seed=3)
    expected = {
        "prompts": 4,
        "gold_mean": 2.0,
        "gold_minus_reference_mean": 1.0,  # differences 2, 0, -1, 3
        **interval("gold_minus_reference", paired_bootstrap_interval([2.0, 0.0, -1.0, 3.0], 3, 200)),
        "gold_win_rate_vs_reference": 2.5 / 4,
        **interval("gold_win_rate_vs_reference", wilson_interval(2.5, 4)),
        "kl_to_reference_mean": 1.0,
        **interval("kl_to_reference", paired_bootstrap_interval(OWN.kl, 3, 200)),
        "eos_rate": 0.75,
        "length_mean": 11 / 4,
        "distinct_1": 3 / 11,  # 5, 6 and EOS
        "distinct_2": 3 / 7,  # 5 5, 5 EOS, 6 5
    }
    assert results == pytest.approx(expected)
    assert list(results) == list(expected)


def test_a_metric_of_responses_is_an_entry_in_the_table(monkeypatch):
    monkeypatch.setitem(OF_RESPONSES, "empty_rate", lambda responses: sum(not text for text in responses.texts) / 4)
    assert response_metrics(OWN, REFERENCE, 200, 3)["empty_rate"] == 0.25


def test_without_tasks_there_is_no_grade():
    own, reference = (replace(responses, grades=[None] * 4) for responses in (OWN, REFERENCE))
    results = response_metrics(own, reference, 200, 3)
    whole = response_metrics(OWN, REFERENCE, 200, 3)
    assert results == {name: value for name, value in whole.items() if not name.startswith("gold")}
    assert not any({"gold", "reference_gold"} & record.keys() for record in sample_records(PROMPTS, own, reference))


def test_with_tasks_in_a_part_of_the_prompts_grades_are_over_that_part():
    own = replace(OWN, grades=[None, 1.0, None, 4.0])
    reference = replace(REFERENCE, grades=[None, 1.0, None, 1.0])
    results = response_metrics(own, reference, 200, 3)
    assert results["gold_prompts"] == 2
    assert results["gold_mean"] == 2.5
    assert results["gold_minus_reference_mean"] == 1.5
    assert results["gold_win_rate_vs_reference"] == 0.75
    assert results["gold_win_rate_vs_reference_ci_low"] == pytest.approx(wilson_interval(1.5, 2)[0])
    records = sample_records(PROMPTS, own, reference)
    assert [record.get("gold") for record in records] == [None, 1.0, None, 4.0]
    assert ["reference_gold" in record for record in records] == [False, True, False, True]


PROMPTS = [
    Prompt(row, [1], [{"role": "user", "content": f"{row}?"}], {"task": "sums"}, {}, "sums") for row in (2, 3, 5, 8)
]


def test_samples_have_what_a_template_gets_beside_the_messages():
    context = {"tools": [{"type": "function", "function": {"name": "add"}}], "template_arguments": {"think": False}}
    cut = PROMPTS[1]._replace(context={**context, "text": "2", "cut": True})
    first, second, third, _ = sample_records([PROMPTS[0]._replace(context=context), cut, *PROMPTS[2:]], OWN, None)
    for record in (first, second):
        assert context.items() <= record.items()
    assert not {"tools", "template_arguments"} & third.keys()
    assert second["prompt"] == "2"


def test_samples_show_prompt_and_both_responses():
    own = replace(OWN, kl=[0.50000049, 1.5, -1.0, 3.0])
    records = sample_records(PROMPTS, own, REFERENCE)
    assert records[0] == {
        "row": 2,
        "source": "sums",
        "prompt": [{"role": "user", "content": "2?"}],
        "response": "aa",
        "kl": 0.5,
        "length": 3,
        "ended": True,
        "reference_response": "a",
        "reference_ended": True,
        "gold": 3.0,
        "reference_gold": 1.0,
        "prompt_ids": [1],
        "response_ids": [5, 5, EOS],
        "reference_response_ids": [5, EOS],
    }
    assert [record["row"] for record in records] == [2, 3, 5, 8]


def test_a_prompt_without_messages_is_its_text_and_the_reference_has_none_beside_it():
    prompts = [prompt._replace(messages=[], context={"text": f"{prompt.row}?"}) for prompt in PROMPTS]
    record = sample_records(prompts, OWN, None)[0]
    assert record["prompt"] == "2?"
    assert [key for key in record if "reference" in key or key == "kl"] == []


def test_the_reference_is_compared_with_nothing():
    alone, whole = response_metrics(REFERENCE, None, 200, 3), response_metrics(REFERENCE, REFERENCE, 200, 3)
    assert alone == {name: value for name, value in whole.items() if "reference" not in name}


def test_scores_of_a_reward_model():
    results = score_metrics([1.0, 1.0, 1.0, 5.0], [0.0, 1.0, 2.0, 3.0], 200, 3)
    assert results == pytest.approx(
        {
            "reward_mean": 2.0,
            "prompts": 4,
            "reward_minus_reference_mean": 0.5,  # differences 1, 0, -1, 2
            **interval("reward_minus_reference", paired_bootstrap_interval([1.0, 0.0, -1.0, 2.0], 3, 200)),
            "reward_win_rate_vs_reference": 2.5 / 4,  # two wins and a tie
            **interval("reward_win_rate_vs_reference", wilson_interval(2.5, 4)),
        }
    )
    assert score_metrics([1.0, 3.0], None, 200, 3) == {"reward_mean": 2.0, "prompts": 2}


def test_perplexity_counts_tokens_and_not_texts():
    """Two texts of 1 and 3 tokens: the mean over texts of their means would be 2.5."""
    results = text_metrics([-4.0, -3.0], [1, 3])
    assert results == pytest.approx({"sft_loss": 7 / 4, "sft_perplexity": math.exp(7 / 4), "sft_rows": 2})


def test_sources_have_columns_of_their_own_where_there_are_several():
    values = [1.0, 2.0, 6.0]

    def measure(rows):
        return {"mean": sum(values[row] for row in rows) / len(rows), "n": len(rows)}

    assert with_sources(measure, ["b", "a", "b"]) == {
        **{"mean": 3.0, "n": 3},
        **{"mean/a": 2.0, "n/a": 1, "mean/b": 3.5, "n/b": 2},
    }
    assert with_sources(measure, ["a"] * 3) == {"mean": 3.0, "n": 3}


def test_implicit_rewards_of_pairs():
    assert preference_metrics([0.5, -0.5, 1e-4, 2e-3]) == {
        "preference_accuracy": 2.5 / 4,  # the third is a tie within 1e-3, the fourth is none
        **interval("preference_accuracy", wilson_interval(2.5, 4)),
        "preference_pairs": 4,
    }


def test_implicit_margins_are_differences_of_differences():
    assert implicit_margins([-1.0, -2.0], [-3.0, -1.0], [-2.0, -2.0], [-2.5, -1.5]) == [2.0 - 0.5, -1.0 + 0.5]
