"""Reward models that train_rm makes: what they start from, which loss, and what is known of their scores."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import correlation, mean, stdev
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from stages.lib.command.jsonl import read_jsonl
from stages.lib.data.token_tables import (
    PREFERENCE_SCHEMA,
    TOKENIZER_NOTE,
    UNPAIRED_SCHEMA,
    read_note,
    read_table,
    write_table,
)
from stages.lib.objectives.pairwise_loss import pairwise_logistic_losses
from stages.lib.settings.check import check_settings
from stages.lib.settings.declaration import block
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.reading import Threshold
from stages.lib.settings.sources import FileSource
from tests.stages.data_stages import write_rows
from tests.stages.tiny_pipeline import call, change, change_entries, inside, read_yaml, refusal, write_yaml
from tests.tables import rewrite, rollout_rows

Copy = Callable[..., Path]


def scores_of_replies(folder: Path, model: str, split: str) -> list[float]:
    """Of both replies of all pairs, by transformers."""
    classifier = AutoModelForSequenceClassification.from_pretrained(folder / model).eval()
    pairs = read_table(folder / f"data/tokens/{split}/preference.arrow", PREFERENCE_SCHEMA)
    with torch.no_grad():
        return [
            float(classifier(torch.tensor([row["prompt_ids"] + row[side]])).logits)
            for side in ("chosen_ids", "rejected_ids")
            for row in pairs
        ]


def results_of(folder: Path, name: str) -> dict[str, float]:
    return json.loads((folder / f"metrics/training/{name}.json").read_text())


def config_of(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"models/{name}/config.json").read_text())


def with_second_model(folder: Path, **changed: Any) -> None:
    """params.yaml with a second reward model, second, as the first one but for `changed`."""
    params = read_yaml(folder / "params.yaml")
    params["train_rm"]["second"] = deepcopy(params["train_rm"]["rm"]) | changed
    write_yaml(folder / "params.yaml", params)


def test_mean_and_deviation_of_held_out_scores_are_in_the_folder(tiny: Path) -> None:
    scores, config, results = (
        scores_of_replies(tiny, "models/rm", "validation"),
        config_of(tiny, "rm"),
        results_of(tiny, "rm"),
    )
    assert (config["mean"], config["std"]) == (results["validation_reward_mean"], results["validation_reward_std"])
    assert config["mean"] == pytest.approx(mean(scores), abs=1e-6)
    assert config["std"] == pytest.approx(stdev(scores), rel=1e-5)


def test_evaluation_by_parts_is_of_the_test_pairs(tiny: Path) -> None:
    found = json.loads((tiny / "metrics/evaluate_rm/rm.json").read_text())
    pairs = read_table(tiny / "data/tokens/test/preference.arrow", PREFERENCE_SCHEMA)
    scores, lengths = scores_of_replies(tiny, "models/rm", "test"), [len(ids) for ids in pairs["chosen_ids"]]
    lengths += [len(ids) for ids in pairs["rejected_ids"]]
    count = len(pairs)
    assert found["length_correlation"] == pytest.approx(correlation(scores, lengths), abs=1e-5)
    longer = [(a > b) + 0.5 * (a == b) for a, b in zip(lengths[:count], lengths[count:], strict=True)]
    assert found["length_baseline_accuracy"] == pytest.approx(sum(longer) / count)
    for part in ("length_difference", "reliability"):
        sizes = [value for key, value in found.items() if key.startswith(part) and key.endswith("_pairs")]
        assert sum(sizes) == count
    assert not any(key.startswith("data_margin") for key in found)


def test_the_accuracy_by_margin_is_given_where_pairs_have_margins(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    margins = [None, *(float(number % 2) for number in range(11))]
    path = folder / "data/tokens/test/preference.arrow"
    rewrite(path, PREFERENCE_SCHEMA, lambda columns: columns | {"margin": margins})
    call(folder, "evaluate_rm@rm")
    found = json.loads((folder / "metrics/evaluate_rm/rm.json").read_text())
    assert [found[f"data_margin_{number}_mean"] for number in (1, 2)] == [0.0, 1.0]
    assert [found[f"data_margin_{number}_pairs"] for number in (1, 2)] == [6, 5]


def test_scores_are_standardised_where_that_is_asked_for(copy_of_tiny: Copy, tiny: Path) -> None:
    folder, config = copy_of_tiny(), config_of(tiny, "rm")
    change(folder / "params.yaml", {"score_samples": {"standardise_reward": True}})
    change_entries(folder, {"train_grpo": {"standardise_reward": True}})
    call(folder, "score_samples@sft")
    call(folder, "train_grpo")
    for read, of_first in (
        (lambda place: read_jsonl(place / "data/sample_scores/sft.jsonl"), 12),
        (lambda place: rollout_rows(place, "grpo"), 8),
    ):
        plain, scaled = ([row["score"] for row in read(place)][:of_first] for place in (tiny, folder))
        assert scaled == pytest.approx([(score - config["mean"]) / config["std"] for score in plain], abs=1e-4)


def test_a_reward_model_that_starts_from_another_keeps_its_head(copy_of_tiny: Copy, tiny: Path) -> None:
    folder = copy_of_tiny()
    with_second_model(folder, model="models/rm", keep="last", save_every={"steps": 2, "keep_last_k": 1})
    change(
        folder / "params.yaml", {"train_rm": {"second": {"optimizer": {"learning_rate": 1e-12, "weight_decay": 0.0}}}}
    )
    call(folder, "train_rm@second")
    before, after = (load_file(folder / f"models/{name}/model.safetensors") for name in ("rm", "second"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.allclose(after[name], weight, rtol=0, atol=1e-8), name
    assert config_of(folder, "second")["mean"] == pytest.approx(config_of(tiny, "rm")["mean"])
    assert not {"mean", "std"} & config_of(folder, "second/step_4").keys()  # they would be those of other weights


def test_an_adapter_on_a_reward_model_brings_the_whole_head(copy_of_tiny: Copy) -> None:
    """PEFT puts adapter and head on the reward model that training started from."""
    from peft import PeftModel

    folder = copy_of_tiny()
    with_second_model(folder, model="models/rm", lora=block(LoraSettings, rank=2, save_adapter=True))
    call(folder, "train_rm@second")
    head = load_file(folder / "models/second/model.safetensors")["score.weight"]
    assert not torch.equal(head, load_file(folder / "models/rm/model.safetensors")["score.weight"])
    base = AutoModelForSequenceClassification.from_pretrained(folder / "models/rm")
    adapted = PeftModel.from_pretrained(base, folder / "models/second/adapter").eval()
    whole = AutoModelForSequenceClassification.from_pretrained(folder / "models/second").eval()
    ids = torch.tensor([read_table(folder / "data/tokens/test/preference.arrow", PREFERENCE_SCHEMA)["prompt_ids"][0]])
    with torch.no_grad():
        assert float(adapted(ids).logits) == pytest.approx(float(whole(ids).logits), abs=1e-5)


@pytest.mark.parametrize(
    ("layer", "said"), [("v_head.summary", "its layer v_head.summary"), ("value_head", "value_head")]
)
def test_a_head_that_would_be_lost_is_refused(
    copy_of_tiny: Copy, capsys: pytest.CaptureFixture, layer: str, said: str
) -> None:
    folder = copy_of_tiny()
    file = folder / "models/sft/model.safetensors"
    tensors = load_file(file) | {f"{layer}.weight": torch.zeros(1, 32)}
    save_file(tensors, file, metadata={"format": "pt"})
    line = refusal(folder, "train_rm@rm", capsys)
    assert (
        "models/sft: a reward model starts from a language model, or from one whose head is a layer named score" in line
    )
    assert said in line


def test_a_classifier_of_several_labels_is_refused(copy_of_tiny: Copy, capsys: pytest.CaptureFixture) -> None:
    folder = copy_of_tiny()
    with_second_model(folder, model="models/rm")
    config = config_of(folder, "rm") | {"id2label": {"0": "bad", "1": "good"}}
    (folder / "models/rm/config.json").unlink()
    (folder / "models/rm/config.json").write_text(json.dumps(config))
    assert "a classifier with another head than that" in refusal(folder, "train_rm@second", capsys)


@pytest.mark.parametrize("use_margin", [False, True])
def test_margins_that_nothing_reads_are_told(
    copy_of_tiny: Copy, capsys: pytest.CaptureFixture, use_margin: bool
) -> None:
    folder = copy_of_tiny()
    for split in ("train", "validation"):
        path = folder / f"data/tokens/{split}/preference.arrow"
        rewrite(path, PREFERENCE_SCHEMA, lambda columns: columns | {"margin": [1.5] * len(columns["row"])})
    change_entries(folder, {"train_rm": {"loss": {"use_margin": use_margin}}})
    capsys.readouterr()
    call(folder, "train_rm@rm")
    said = "train_rm@rm: the pairs' margins are not read (loss.use_margin: false)"
    assert (said in capsys.readouterr().out.splitlines()) == (not use_margin)


@pytest.mark.parametrize("loss", [{"label_smoothing": 0.3}, {"centering_coefficient": 0.5}])
def test_the_loss_of_params_yaml_is_the_one_that_is_computed(copy_of_tiny: Copy, loss: dict[str, float]) -> None:
    """Of the model that was published, on the validation rows, by transformers."""
    folder = copy_of_tiny()
    change_entries(folder, {"train_rm": {"loss": loss, "keep": "last"}})
    call(folder, "train_rm@rm")
    scores = torch.tensor(scores_of_replies(folder, "models/rm", "validation"), dtype=torch.float64)
    chosen, rejected = scores.chunk(2)
    e, c = loss.get("label_smoothing", 0.0), loss.get("centering_coefficient", 0.0)
    logs = (1 - e) * torch.sigmoid(chosen - rejected).log() + e * torch.sigmoid(rejected - chosen).log()
    wanted = (c * (chosen + rejected) ** 2 - logs).mean()
    assert results_of(folder, "rm")["validation_loss"] == pytest.approx(float(wanted), rel=1e-5)


def with_scores(folder: Path, split: str, score: Callable[[int], float | None]) -> None:
    """A table of unpaired rows made of the chosen replies of pairs."""
    path = folder / f"data/tokens/{split}/preference.arrow"
    pairs = read_table(path, PREFERENCE_SCHEMA)
    note = {TOKENIZER_NOTE: read_note(path, TOKENIZER_NOTE)}
    rows = {name: pairs[name][:] for name in ("row", "prompt_ids", "source")}
    rows |= {"completion_ids": pairs["chosen_ids"][:], "label": [True] * len(pairs)}
    rows |= {"mismatched_ids": [None] * len(pairs), "score": [score(number) for number in range(len(pairs))]}
    write_table(folder / f"data/tokens/{split}/unpaired.arrow", rows, UNPAIRED_SCHEMA.with_metadata(note))


REGRESSION = {"kind": "unpaired", "loss": {"type": "regression"}}


def test_a_regression_on_scores(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    for split in ("train", "validation"):
        with_scores(folder, split, lambda number: number % 3 - 1.0)
    change_entries(folder, {"train_rm": REGRESSION | {"keep": "last"}})
    call(folder, "train_rm@rm")
    results, config = results_of(folder, "rm"), config_of(folder, "rm")
    rewards = scores_of_replies(folder, "models/rm", "validation")[:12]
    scores = [number % 3 - 1.0 for number in range(12)]
    errors = [(reward - score) ** 2 for reward, score in zip(rewards, scores, strict=True)]
    assert results["validation_loss"] == pytest.approx(mean(errors), rel=1e-5)
    assert results["validation_reward_mean"] == pytest.approx(mean(rewards), abs=1e-6)
    assert results["validation_reward_std"] == config["std"] == pytest.approx(stdev(rewards), rel=1e-4)
    assert results["validation_score_std"] == pytest.approx(stdev(scores))
    assert results["validation_correlation"] == pytest.approx(correlation(rewards, scores), abs=1e-4)


def test_ratings_of_raw_rows_are_what_is_learned(copy_of_tiny: Copy) -> None:
    """From a file of replies with a rating each, by the stages, to a model."""
    folder = copy_of_tiny()
    raw = [
        {"prompt": f"film {number}", "completion": "good " * (1 + number % 3), "helpfulness": number % 3}
        for number in range(60)
    ]
    write_rows(folder / "data/raw/ratings.jsonl", raw)
    threshold = block(Threshold, score="helpfulness", good_from=1.0, bad_below=1.0)
    source = block(FileSource, path="data/raw/ratings.jsonl", kinds=["unpaired"], threshold=threshold)
    params = read_yaml(folder / "params.yaml")
    params["sources"]["files"]["ratings"] = source
    params["prepare_data"] |= {"kinds": ["sft", "preference", "prompts", "unpaired"], "validation_fraction": 0.2}
    params["train_rm"]["rm"] |= REGRESSION | {"epochs": 4.0}
    write_yaml(folder / "params.yaml", params)
    with inside(folder):
        check_settings()
    for stage in ("read_source@ratings", "prepare_data", "tokenize_data@unpaired", "train_rm@rm"):
        call(folder, stage)
    table = read_table(folder / "data/tokens/train/unpaired.arrow", UNPAIRED_SCHEMA)
    assert sorted({*table["score"]}) == [0.0, 1.0, 2.0]
    assert [score >= 1 for score in table["score"]] == table["label"][:]
    results = results_of(folder, "rm")
    assert results["validation_correlation"] > 0.5  # the rating is the number of words
    assert results["validation_loss"] < results["validation_score_std"] ** 2


def test_rows_without_a_score_are_refused(copy_of_tiny: Copy, capsys: pytest.CaptureFixture) -> None:
    folder = copy_of_tiny()
    with_scores(folder, "train", float)
    with_scores(folder, "validation", lambda number: None if number == 3 else 1.0)
    change_entries(folder, {"train_rm": REGRESSION})
    said = "data/tokens/validation/unpaired.arrow, row 3 has no score: name the column of the scores in the threshold"
    assert said in refusal(folder, "train_rm@rm", capsys)
    change_entries(folder, {"train_rm": {"kind": "preference"}})
    said = "train_rm.rm: kind must be unpaired with a loss of type regression, found preference"
    assert said in refusal(folder, "train_rm@rm", capsys)


def test_on_a_body_in_bf16_head_and_loss_are_float32(copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that passed through bfloat16 would all be numbers of eight bits."""
    folder, seen = copy_of_tiny(), []

    def observed(*scores: torch.Tensor, **options: float) -> torch.Tensor:
        losses = pairwise_logistic_losses(*scores, **options)
        seen.extend([scores[0].detach(), losses.detach()])
        return losses

    monkeypatch.setattr("stages.lib.objectives.reward.pairwise_logistic_losses", observed)
    change_entries(folder, {"train_rm": {"precision": "bf16"}})
    call(folder, "train_rm@rm")
    assert {values.dtype for values in seen} == {torch.float32}
    assert all(not torch.equal(values, values.bfloat16().float()) for values in seen)
