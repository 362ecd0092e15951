"""The evaluation script, tiny: its numbers against transformers', its grades by task, how it ends on bad facts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.lib.data.prompts import json_text, prompts_of
from stages.lib.data.token_tables import PROMPT_SCHEMA, read_table
from stages.lib.runs.partial_results import PartialResults
from stages.lib.tasks.film_gold import gold_utility
from stages.lib.tasks.table import TASKS
from stages.prepare_data import write_prepared
from tests.lib.tasks import sums
from tests.stages.tiny_pipeline import call, change, refusal
from tests.tables import Columns, rewrite

Copy = Callable[..., Path]
PROMPTS = "data/tokens/test/prompts.arrow"


def metrics(folder: Path, name: str) -> dict[str, float]:
    return json.loads((folder / f"metrics/{name}.json").read_text())


def samples_of(folder: Path, policy: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"data/samples/{policy}.jsonl").read_text().splitlines()]


def is_a_tie(results: dict[str, float]) -> None:
    for name in ("reward", "gold"):
        assert results[f"{name}_minus_sft_mean"] == 0
        assert results[f"{name}_win_rate_vs_sft"] == 0.5
    assert results["kl_to_sft_mean"] == 0
    assert results["preference_accuracy"] == 0.5


def test_fine_tuning_beside_itself_is_a_tie(tiny: Path) -> None:
    is_a_tie(metrics(tiny, "evaluate/sft"))


def test_fine_tuning_beside_itself_is_a_tie_in_bf16_as_well(copy_of_tiny: Copy) -> None:
    """However evaluate cuts its batches, in which a log-prob in bf16 is another one than in those of ref_logprobs."""
    folder = copy_of_tiny()
    change(folder / "params.yaml", {"ref_logprobs": {"sft": {"precision": "bf16"}}, "evaluate": {"precision": "bf16"}})
    call(folder, "ref_logprobs")
    change(folder / "runtime.yaml", {"default": {"micro_batch_tokens": 500}})
    call(folder, "evaluate@sft")
    is_a_tie(metrics(folder, "evaluate/sft"))


def test_a_reference_of_another_precision_is_computed_anew(copy_of_tiny: Copy, tiny: Path) -> None:
    folder = copy_of_tiny()
    before = {policy: metrics(tiny, f"evaluate/{policy}") for policy in ("sft", "dpo")}
    change(folder / "params.yaml", {"ref_logprobs": {"sft": {"precision": "bf16"}}})
    call(folder, "ref_logprobs")
    for policy, expected in before.items():
        call(folder, f"evaluate@{policy}")
        assert metrics(folder, f"evaluate/{policy}") == expected


def test_the_evaluation_is_that_of_its_samples(tiny: Path) -> None:
    samples = samples_of(tiny, "ppo")
    prepared = [json.loads(line) for line in (tiny / "data/prepared/validation/prompts.jsonl").read_text().splitlines()]
    assert [sample["prompt"] for sample in samples] == [prepared[sample["row"]]["prompt"] for sample in samples]
    gold = [gold_utility(prepared[sample["row"]]["facts"], sample["response"]) for sample in samples]
    assert [sample["gold"] for sample in samples] == gold
    results = metrics(tiny, "evaluate/ppo")
    assert results["gold_mean"] == pytest.approx(sum(gold) / len(gold))
    assert "gold_prompts" not in results  # all of them
    assert results["eos_rate"] == sum(sample["ended"] for sample in samples) / len(samples)
    assert results["reward_mean"] == pytest.approx(sum(sample["reward"] for sample in samples) / len(samples), abs=1e-5)


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
    answers = kept[1]  # after those of SFT
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


def test_a_second_task_is_one_file_and_an_entry_in_the_table(
    copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are written, encoded and graded by the scripts that know no task; then some prompts lose theirs."""
    monkeypatch.setitem(TASKS, "sums", sums)
    folder = copy_of_tiny()
    kinds = {kind: folder / f"written/{kind}" for kind in ("sft", "preference", "prompts")}
    write_prepared(sums.rows({"rows": 6}, 30), tuple(kinds), kinds)
    call(folder, "tokenize_data@prompts", rows="written/prompts")
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
