"""The evaluation script, tiny: its numbers against transformers', its grades by task, how it ends on bad facts."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.lib.data.prompts import json_text, prompts_of
from stages.lib.data.token_tables import PREFERENCE_SCHEMA, PROMPT_SCHEMA, SFT_SCHEMA, read_table
from stages.lib.runs.partial_results import PartialResults
from stages.lib.tasks.film_gold import gold_utility
from stages.lib.tasks.table import TASKS
from tests.lib.tasks import sums
from tests.stages.tiny_pipeline import call, change, read_yaml, refusal, write_yaml
from tests.tables import Columns, rewrite

Copy = Callable[..., Path]
PROMPTS = "data/tokens/test/prompts.arrow"


def metrics(folder: Path, name: str) -> dict[str, float]:
    return json.loads((folder / f"metrics/{name}.json").read_text())


def samples_of(folder: Path, policy: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"data/samples/{policy}.jsonl").read_text().splitlines()]


def test_the_reference_is_compared_with_nothing(tiny: Path) -> None:
    """Itself would be a tie whatever it is worth."""
    results, scores = metrics(tiny, "evaluate/sft"), metrics(tiny, "score_samples/sft")
    assert [key for key in (*results, *scores) if "reference" in key or "preference" in key] == []
    assert {"gold_mean", "sft_perplexity", "eos_rate"} <= results.keys()
    assert "reference_response" not in samples_of(tiny, "sft")[0]


def test_a_model_under_two_names_is_a_tie_with_itself_in_bf16_as_well(copy_of_tiny: Copy) -> None:
    """However evaluate cuts its batches, in which a log-prob in bf16 is another one."""
    folder = copy_of_tiny()
    shutil.copytree(folder / "models/sft", folder / "models/twin")
    change(folder / "params.yaml", {"evaluate": {"precision": "bf16"}})
    change(folder / "runtime.yaml", {"default": {"micro_batch_tokens": 500}})
    settings = read_yaml(folder / "params.yaml")
    settings["evaluate"]["policies"] = {"twin": "models/twin"}
    settings["score_samples"]["policies"] = ["twin"]
    write_yaml(folder / "params.yaml", settings)
    call(folder, "evaluate")  # the only one needs no name
    call(folder, "score_samples")
    results = metrics(folder, "evaluate/twin") | metrics(folder, "score_samples/twin")
    for name in ("reward", "gold"):
        assert results[f"{name}_minus_reference_mean"] == 0
        assert results[f"{name}_win_rate_vs_reference"] == 0.5
    assert results["kl_to_reference_mean"] == 0
    assert results["preference_accuracy"] == 0.5


def test_perplexity_is_that_of_the_tokens_that_are_trained(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    table = read_table(tiny / "data/tokens/test/sft.arrow", SFT_SCHEMA)
    model, losses = AutoModelForCausalLM.from_pretrained(tiny / "models/dpo"), []
    for row in table:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logps = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
        found = -logps.gather(-1, ids[0, 1:, None]).squeeze(-1)
        losses += found[torch.tensor(row["loss_mask"][1:])].tolist()
    results = metrics(tiny, "evaluate/dpo")
    assert results["sft_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert results["sft_perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert results["sft_rows"] == len(table)


def test_implicit_accuracy_is_of_both_models_on_the_test_pairs(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    models = {name: AutoModelForCausalLM.from_pretrained(tiny / f"models/{name}") for name in ("dpo", "sft")}
    right = []
    for row in read_table(tiny / "data/tokens/test/preference.arrow", PREFERENCE_SCHEMA):
        gap = {}
        for name, model in models.items():
            logps = []
            for side in ("chosen_ids", "rejected_ids"):
                ids = torch.tensor([row["prompt_ids"] + row[side]])
                with torch.no_grad():
                    logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].double()
                targets = torch.tensor(row[side])[:, None]
                logps.append(float(torch.log_softmax(logits, dim=-1).gather(-1, targets).sum()))
            gap[name] = logps[0] - logps[1]
        right.append(gap["dpo"] > gap["sft"])
    results = metrics(tiny, "evaluate/dpo")
    assert results["preference_accuracy"] == pytest.approx(sum(right) / len(right))
    assert results["preference_pairs"] == len(right)


def test_pairs_alone_are_enough_to_be_evaluated(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    before = metrics(folder, "evaluate/dpo")
    change(folder / "params.yaml", {"prepare_data": {"kinds": ["preference"]}})
    for kind in ("sft", "prompts"):
        (folder / f"data/tokens/test/{kind}.arrow").unlink()
    call(folder, "evaluate@dpo")
    results = metrics(folder, "evaluate/dpo")
    assert results == {key: value for key, value in before.items() if key in results}
    assert "preference_accuracy" in results
    assert "sft_loss" not in results
    assert samples_of(folder, "dpo") == []


def test_each_source_has_its_columns(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    half = {"sft": SFT_SCHEMA, "preference": PREFERENCE_SCHEMA, "prompts": PROMPT_SCHEMA}
    for kind, schema in half.items():
        rewrite(
            folder / f"data/tokens/test/{kind}.arrow",
            schema,
            lambda columns: columns | {"source": ["a" if row < 4 else "b" for row in range(len(columns["row"]))]},
        )
    before = metrics(folder, "evaluate/dpo")
    for stage in ("evaluate@dpo", "score_samples@dpo", "evaluate_rm@rm"):
        call(folder, stage)
    results = metrics(folder, "evaluate/dpo")
    assert {key: value for key, value in results.items() if "/" not in key} == before
    assert (results["prompts/a"], results["prompts/b"]) == (4, 8)
    gold = [sample["gold"] for sample in samples_of(folder, "dpo")]
    assert results["gold_mean/a"] == sum(gold[:4]) / 4
    assert results["preference_accuracy"] * 12 == pytest.approx(
        4 * results["preference_accuracy/a"] + 8 * results["preference_accuracy/b"]
    )
    scores = metrics(folder, "score_samples/dpo")
    assert 12 * scores["reward_mean"] == pytest.approx(4 * scores["reward_mean/a"] + 8 * scores["reward_mean/b"])
    of_rm = metrics(folder, "evaluate_rm/rm")
    assert 12 * of_rm["accuracy"] == pytest.approx(4 * of_rm["accuracy/a"] + 8 * of_rm["accuracy/b"])


def test_the_evaluation_is_that_of_its_samples(tiny: Path) -> None:
    samples = samples_of(tiny, "ppo")
    prepared = [json.loads(line) for line in (tiny / "data/prepared/test/prompts.jsonl").read_text().splitlines()]
    assert [sample["prompt"] for sample in samples] == [prepared[sample["row"]]["prompt"] for sample in samples]
    gold = [gold_utility(prepared[sample["row"]]["facts"], sample["response"]) for sample in samples]
    assert [sample["gold"] for sample in samples] == gold
    results = metrics(tiny, "evaluate/ppo")
    assert results["gold_mean"] == pytest.approx(sum(gold) / len(gold))
    assert "gold_prompts" not in results  # all of them
    assert results["eos_rate"] == sum(sample["ended"] for sample in samples) / len(samples)
    scores = [json.loads(line)["score"] for line in (tiny / "data/sample_scores/ppo.jsonl").read_text().splitlines()]
    found = metrics(tiny, "score_samples/ppo")["reward_mean"]
    assert found == pytest.approx(sum(scores) / len(samples), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 0])
def test_reward_and_kl_are_those_that_transformers_computes(
    copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    folder = copy_of_tiny()
    change(folder / "params.yaml", {"evaluate": {"temperature": temperature, "max_prompts": 5}})
    kept: list[dict[str, list]] = []
    record = PartialResults._record
    monkeypatch.setattr(PartialResults, "_record", lambda self, value: kept.append(value) or record(self, value))
    call(folder, "evaluate@ppo")
    answers = next(value for value in kept if "ids" in value)
    call(folder, "score_samples@ppo")
    answers |= {"rewards": kept[-1]["score"]}
    assert_residual_is_beside_the_line_of_test_pairs(folder, kept[-2], kept[-1]["score"])
    models = {name: AutoModelForCausalLM.from_pretrained(folder / f"models/{name}") for name in ("ppo", "sft")}
    scorer = AutoModelForSequenceClassification.from_pretrained(folder / "models/rm")
    prompts = prompts_of(read_table(folder / PROMPTS, PROMPT_SCHEMA)[:5])
    for prompt, ids, reward, kl in zip(prompts, *(answers[name] for name in ("ids", "rewards", "kl")), strict=True):
        whole = torch.tensor([prompt.ids + ids])
        sums_of: dict[str, float] = {}
        for name, model in models.items():
            with torch.no_grad():
                logits = model(whole).logits[0, len(prompt.ids) - 1 : -1] / (temperature or 1.0)
            if name == "ppo" and temperature == 0:
                assert logits.argmax(dim=-1).tolist() == ids
            sums_of[name] = float(torch.log_softmax(logits, dim=-1).gather(-1, torch.tensor(ids)[:, None]).sum())
        assert kl == pytest.approx(sums_of["ppo"] - sums_of["sft"], abs=1e-4)
        with torch.no_grad():
            assert reward == pytest.approx(float(scorer(whole).logits), abs=1e-4)


def assert_residual_is_beside_the_line_of_test_pairs(
    folder: Path, rewards: dict[str, list[float]], own: list[float]
) -> None:
    pairs = [json.loads(line) for line in (folder / "data/prepared/test/preference.jsonl").read_text().splitlines()]
    gold = [gold_utility(pair["facts"], pair[side][0]["content"]) for side in rewards for pair in pairs]
    slope, intercept = np.polyfit([*rewards["chosen"], *rewards["rejected"]], gold, 1)
    found = metrics(folder, "score_samples/ppo")
    expected = metrics(folder, "evaluate/ppo")["gold_mean"] - intercept - slope * sum(own) / len(own)
    assert found["gold_residual_mean"] == pytest.approx(expected, rel=1e-6)
    assert found["gold_line_slope"] == pytest.approx(slope, rel=1e-6)
    assert found["gold_residual_ci_low"] < expected < found["gold_residual_ci_high"]
    assert found["gold_line_pairs"] == len(pairs)
    assert "judge_mean" not in found


def test_a_second_task_is_one_file_and_an_entry_in_the_table(
    copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are written, encoded and graded by the scripts that know no task; then some prompts lose theirs."""
    monkeypatch.setitem(TASKS, "sums", sums)
    folder = copy_of_tiny()
    for split, number in (("train", 30), ("validation", 30), ("test", 36)):
        rows = [row.values for row in sums.rows({"rows": 6}, 30) if row.kind == "prompts"]
        of_split = [{**row, "source": "sums"} for row in rows if number <= row["facts"]["answer"] - 2 < number + 6]
        file = folder / f"written/{split}/prompts.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in of_split))
    call(folder, "tokenize_data@prompts", prepared="written")
    call(folder, "evaluate@ppo")
    samples, results = samples_of(folder, "ppo"), metrics(folder, "evaluate/ppo")
    assert [sample["prompt"][0]["content"] for sample in samples] == [f"what is {36 + n} plus 2?" for n in range(6)]
    expected = [float(str(38 + number) in sample["response"]) for number, sample in enumerate(samples)]
    assert [sample["gold"] for sample in samples] == expected
    assert results["gold_mean"] == sum(expected) / 6

    def without_some(columns: Columns) -> Columns:
        return columns | {
            "facts": [json_text({"answer": 1}) if row < 4 else facts for row, facts in enumerate(columns["facts"])]
        }

    rewrite(folder / PROMPTS, PROMPT_SCHEMA, without_some)
    call(folder, "evaluate@ppo")
    results = metrics(folder, "evaluate/ppo")
    assert (results["prompts"], results["gold_prompts"]) == (6, 2)
    assert results["gold_mean"] == sum(expected[4:]) / 2
    assert ["gold" in sample for sample in samples_of(folder, "ppo")] == [False] * 4 + [True] * 2


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"task": "film_reveiws"},
            "the facts name the task 'film_reveiws', which is none; did you mean 'film_reviews'?",
        ),
        ({"task": 3}, "the facts name the task 3, which is none"),
        (
            {"task": "film_reviews", "film": "a", "genre": "opera", "aspect": "plot"},
            "the fact genre 'opera' is not one",
        ),
        ([], "facts: expected an object, found list"),
    ],
)
def test_facts_that_no_task_can_read_are_one_line(
    copy_of_tiny: Copy, capsys: pytest.CaptureFixture, facts: Any, message: str
) -> None:
    folder = copy_of_tiny()
    rewrite(
        folder / PROMPTS,
        PROMPT_SCHEMA,
        lambda columns: columns | {"facts": [*columns["facts"][:3], json_text(facts), *columns["facts"][4:]]},
    )
    said = refusal(folder, "evaluate@sft", capsys)
    assert said.startswith(f"error: {PROMPTS}, row 3")
    assert message in said
