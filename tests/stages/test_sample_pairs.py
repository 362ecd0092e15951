"""A policy's own replies become rows: two rounds of DPO, one of rejection sampling, through the real scripts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from stages.lib.command.errors import StageError
from stages.lib.command.jsonl import read_jsonl
from stages.lib.command.params import build
from stages.lib.data.chat import decode_completion, load_tokenizer
from stages.lib.data.mapped_table import MappedTable
from stages.lib.data.token_tables import PREFERENCE_SCHEMA, PROMPT_SCHEMA, SFT_SCHEMA, read_table
from stages.lib.runs.partial_results import PartialResults
from stages.lib.settings.check import check_settings
from stages.lib.settings.declaration import block
from stages.lib.settings.ref_logprobs import RefLogprobs
from stages.lib.settings.rewards import RepetitionReward
from stages.lib.settings.sample_pairs import AllPairs, BestOfN, SamplePairs
from stages.lib.settings.train_dpo import TrainDpo
from stages.lib.settings.train_sft import TrainSft
from stages.sample_pairs import prompts_of_round
from tests.loaded_python import torchrun
from tests.stages.test_resume import Cut
from tests.stages.tiny_pipeline import call, change, contents, inside, read_yaml, refusal, start, write_yaml

Copy = Callable[..., Path]
# Of so short a training: a reply in six or so ends, and so 60 tokens and pairs with others.
SHORT = {"prompts": 12, "samples_per_prompt": 6, "max_new_tokens": 60, "seed": 3}
PAIRS = SHORT | {"makes": block(AllPairs, unfinished="rejected")}
LEAST = -0.05
DPO = {"epochs": 1.0, "batch_size": 4, "eval_every": 1}


def with_rounds(folder: Path) -> None:
    """Two rounds of online DPO, and one of rejection sampling on the prompts of the second."""
    settings = read_yaml(folder / "params.yaml")
    for name, start_from, number in (("first", "models/sft", 1), ("second", "models/dpo-first", 2)):
        rows = f"data/sampled/{name}"
        standard = {"standardise_reward": name == "second"}
        settings["sample_pairs"][name] = block(SamplePairs, model=start_from, round=number, **PAIRS, **standard)
        settings["ref_logprobs"][name] = block(RefLogprobs, model=start_from, tokens=rows)
        reference = f"data/ref_logprobs/{name}"
        dpo = block(TrainDpo, model=start_from, tokens=rows, reference=reference, **DPO)
        settings["train_dpo"][f"dpo-{name}"] = dpo
    settings["sample_pairs"]["best"] = block(SamplePairs, round=2, **SHORT, makes=block(BestOfN))
    fresh = {"fresh": block(RepetitionReward, n=1)}  # −1 times the share of tokens that are repeated
    settings["sample_pairs"]["fresh"] = block(
        SamplePairs, **SHORT, reward_model="models/sft", rewards=fresh, makes=block(BestOfN, least_score=LEAST)
    )
    settings["train_sft"]["sft-best"] = block(TrainSft, model="models/sft", tokens="data/sampled/best", batch_size=2)
    write_yaml(folder / "params.yaml", settings)
    change(folder / "runtime.yaml", {"default": {"rows_per_partial_result": 5}})
    with inside(folder):
        check_settings()


@pytest.fixture(scope="module")
def rounds(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which both rounds, and the one of rejection sampling, have run. Read only."""
    folder = tmp_path_factory.mktemp("rounds") / "project"
    shutil.copytree(tiny, folder, symlinks=True, ignore=shutil.ignore_patterns(".scratch"))
    with_rounds(folder)
    for name in ("first", "second"):
        for stage in (f"sample_pairs@{name}", f"ref_logprobs@{name}", f"train_dpo@dpo-{name}"):
            call(folder, stage)
    for stage in ("sample_pairs@best", "train_sft@sft-best", "sample_pairs@fresh"):
        call(folder, stage)
    return folder


def samples_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return list(read_jsonl(folder / f"data/sampled/{name}/samples.jsonl"))


def pairs_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return list(read_table(folder / f"data/sampled/{name}/train/preference.arrow", PREFERENCE_SCHEMA))


def rewards_of(folder: Path, rows: list[list[int]]) -> list[float]:
    """What transformers' classifier gives each sequence of ids, one at a time."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder / "models/rm").eval()
    with torch.no_grad():
        return [float(model(torch.tensor([ids])).logits[0, 0]) for ids in rows]


def test_pairs_hold_the_ids_that_were_sampled_and_the_better_one_is_chosen(rounds: Path) -> None:
    pairs, samples = pairs_of(rounds, "first"), samples_of(rounds, "first")
    prompts = read_table(rounds / "data/tokens/train/prompts.arrow", PROMPT_SCHEMA)
    ids_of = dict(zip(prompts["row"], prompts["prompt_ids"], strict=True))
    tokenizer = load_tokenizer(rounds / "models/base")
    made = [(sample, places) for sample in samples for places in sample["made"]]
    assert [places["row"] for _, places in made] == [pair["row"] for pair in pairs] == [*range(len(pairs))]
    assert len(pairs) > 3
    for pair, (sample, places) in zip(pairs, made, strict=True):
        assert pair["prompt_ids"] == ids_of[sample["prompt_row"]]
        for side in ("chosen", "rejected"):
            reply, ids = sample["replies"][places[side]], pair[f"{side}_ids"]
            assert decode_completion(tokenizer, ids) == reply["text"]
            assert (len(ids), ids[-1] == tokenizer.eos_token_id) == (reply["length"], reply["ended"])
    sides = [[pair["prompt_ids"] + pair[f"{side}_ids"] for pair in pairs] for side in ("chosen", "rejected")]
    scores = [rewards_of(rounds, rows) for rows in sides]
    for side, found in zip(("chosen", "rejected"), scores, strict=True):
        assert found == pytest.approx([one["replies"][places[side]]["score"] for one, places in made], abs=1e-5)
    gaps = [good - bad for good, bad in zip(*scores, strict=True)]
    assert [pair["margin"] for pair in pairs] == pytest.approx(gaps, abs=1e-5)
    assert min(gaps) > 0
    assert all(sample["replies"][places["chosen"]]["ended"] for sample, places in made)


def test_the_second_round_is_by_standardised_scores(rounds: Path) -> None:
    config = json.loads((rounds / "models/rm/config.json").read_text())
    pairs, samples = pairs_of(rounds, "second"), samples_of(rounds, "second")
    told = [sample["replies"][made["chosen"]]["score"] for sample in samples for made in sample["made"]]
    raw = rewards_of(rounds, [pair["prompt_ids"] + pair["chosen_ids"] for pair in pairs])
    assert told == pytest.approx([(score - config["mean"]) / config["std"] for score in raw], abs=1e-4)


def test_counts_add_up(rounds: Path) -> None:
    results = json.loads((rounds / "metrics/sample_pairs/first.json").read_text())
    samples = samples_of(rounds, "first")
    scores = [[reply["score"] for reply in sample["replies"]] for sample in samples]
    assert (results["prompts"], results["replies"]) == (12, 72)
    assert results["rows"] == len(pairs_of(rounds, "first"))
    assert results["reward_mean"] == pytest.approx(sum(map(sum, scores)) / 72, abs=1e-5)
    assert results["reward_best_mean"] == pytest.approx(sum(map(max, scores)) / 12, abs=1e-5)
    assert results["reward_worst_mean"] == pytest.approx(sum(map(min, scores)) / 12, abs=1e-5)
    assert results["eos_rate"] == sum(reply["ended"] for sample in samples for reply in sample["replies"]) / 72
    assert results["dropped/prompts_without_a_row"] == sum(not sample["made"] for sample in samples)


def test_each_round_is_on_prompts_of_its_own(rounds: Path) -> None:
    asked = {
        name: {sample["prompt_row"] for sample in samples_of(rounds, name)} for name in ("first", "second", "best")
    }
    assert [len(rows) for rows in asked.values()] == [12, 12, 12]
    assert not asked["first"] & asked["second"]
    assert asked["best"] == asked["second"]  # another second round


def test_dpo_trains_on_the_sampled_pairs_and_is_held_out_on_the_prepared_ones(rounds: Path) -> None:
    """It has checked by then that the policy gives them the reference's log-probs before its first step."""
    for name in ("first", "second"):
        results = json.loads((rounds / f"metrics/training/dpo-{name}.json").read_text())
        assert (results["train_rows"], results["validation_rows"]) == (len(pairs_of(rounds, name)), 12)
        card = (rounds / f"models/dpo-{name}/README.md").read_text()
        assert f"`data/sampled/{name}/train/preference.arrow`" in card
        assert "`data/tokens/validation/preference.arrow`" in card


def test_the_best_of_n_is_a_row_for_sft(rounds: Path) -> None:
    table = list(read_table(rounds / "data/sampled/best/train/sft.arrow", SFT_SCHEMA))
    samples = [sample for sample in samples_of(rounds, "best") if sample["made"]]
    prompts = {row["row"]: row for row in read_table(rounds / "data/tokens/train/prompts.arrow", PROMPT_SCHEMA)}
    tokenizer = load_tokenizer(rounds / "models/base")
    assert len(table) == len(samples) > 1
    for row, sample in zip(table, samples, strict=True):
        prompt = prompts[sample["prompt_row"]]
        start = row["loss_mask"].index(True)
        assert row["input_ids"][:start] == prompt["prompt_ids"]
        assert all(row["loss_mask"][start:])
        assert row["input_ids"][-1] == tokenizer.eos_token_id
        finished = [reply for reply in sample["replies"] if reply["ended"]]
        best = max(finished, key=lambda reply: reply["score"])
        assert decode_completion(tokenizer, row["input_ids"][start:]) == best["text"]
        assert json.loads(row["messages"]) == sample["prompt"] == json.loads(prompt["messages"])
    assert json.loads((rounds / "metrics/training/sft-best.json").read_text())["train_rows"] == len(table)


def test_replies_can_be_ranked_by_other_rewards_than_a_model(rounds: Path) -> None:
    samples, tokenizer = samples_of(rounds, "fresh"), load_tokenizer(rounds / "models/base")
    table = list(read_table(rounds / "data/sampled/fresh/train/sft.arrow", SFT_SCHEMA))
    rows = iter(table)
    for sample in samples:
        ended = [reply for reply in sample["replies"] if reply["ended"]]
        best = max(ended, key=lambda reply: reply["score"], default=None)
        assert bool(sample["made"]) == (best is not None and best["score"] >= LEAST)
        if sample["made"]:
            row = next(rows)
            ids = [token for token, own in zip(row["input_ids"], row["loss_mask"], strict=True) if own]
            assert decode_completion(tokenizer, ids) == best["text"]
            assert best["score"] == pytest.approx(len({*ids}) / len(ids) - 1, abs=1e-6)
    dropped = json.loads((rounds / "metrics/sample_pairs/fresh.json").read_text())
    assert 0 < len(table) == 12 - dropped["dropped/prompts_without_a_row"]
    assert dropped["dropped/best_replies_below_least_score"] > 0


def texts_of(folder: Path) -> list[list[str]]:
    return [[reply["text"] for reply in sample["replies"]] for sample in samples_of(folder, "first")]


def outs(folder: Path) -> list[dict[str, bytes]]:
    return [contents(folder / path) for path in ("data/sampled/first", "metrics/sample_pairs/first.json")]


def test_a_killed_run_goes_on_and_a_reply_depends_on_no_batch(
    rounds: Path, copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = copy_of_tiny()
    with_rounds(folder)
    keep = PartialResults.keep

    def cut(self: PartialResults, name: str, *options: Any) -> dict[str, list]:
        if name == "replies-10-12":
            raise Cut
        return keep(self, name, *options)

    with monkeypatch.context() as patch:
        patch.setattr(PartialResults, "keep", cut)
        with pytest.raises(Cut):
            call(folder, "sample_pairs@first")
    assert len([*folder.glob(".scratch/*/kept/*")]) == 2
    capsys.readouterr()
    call(folder, "sample_pairs@first")
    assert "resuming" in capsys.readouterr().out
    assert outs(folder) == outs(rounds)
    shutil.rmtree(folder / ".scratch")
    change(folder / "runtime.yaml", {"default": {"rows_per_partial_result": 7, "generation_batch_size": 7}})
    call(folder, "sample_pairs@first")
    assert texts_of(folder) == texts_of(rounds)


@pytest.mark.slow
def test_two_processes_write_the_same(rounds: Path, copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    with_rounds(folder)
    process = start(folder, "sample_pairs@first", launch=torchrun())
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert [found.keys() for found in outs(folder)] == [found.keys() for found in outs(rounds)]
    assert texts_of(folder) == texts_of(rounds)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"round": 3},
            "params.yaml: sample_pairs.first: round 3 of 12 prompts needs 36 of them, and "
            "data/tokens/train/prompts.arrow has 32 different ones",
        ),
        (
            {"makes": {"type": "best_and_worst", "least_gap": 100.0, "unfinished": "drop"}},
            "sample_pairs.first: no row is left of 12 prompts (",
        ),
        ({"max_new_tokens": 180}, "the longest prompt has"),
    ],
)
def test_what_can_give_no_rows_is_told_in_one_line(
    rounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture, changed: dict[str, Any], message: str
) -> None:
    for name in ("data", "models", "stages", "code_manifests"):
        (tmp_path / name).symlink_to(rounds / name)
    for name in ("params.yaml", "runtime.yaml", "dvc.yaml"):
        shutil.copy(rounds / name, tmp_path / name)
    settings = read_yaml(tmp_path / "params.yaml")
    settings["sample_pairs"]["first"] |= changed
    write_yaml(tmp_path / "params.yaml", settings)
    assert message in refusal(tmp_path, "sample_pairs@first", capsys)


def test_a_prompt_that_stands_in_several_rows_is_in_one_round_alone() -> None:
    ids = [[1, 2], [3], [1, 2], [4], [3], [5]]
    columns = {"row": [2 * place for place in range(6)], "prompt_ids": ids, "messages": ["[]"] * 6, "facts": ["{}"] * 6}
    table = MappedTable(pa.table(columns | {"context": ["{}"] * 6, "source": [""] * 6}))

    def rows(number: int) -> list[int]:
        settings = build(SamplePairs, block(SamplePairs, round=number, prompts=2), "x")
        return [prompt.row for prompt in prompts_of_round(table, Path("x.arrow"), settings, 3, "sample_pairs.x")]

    assert sorted(rows(1) + rows(2)) == [0, 2, 6, 10]
    with pytest.raises(StageError, match=r"round 3 of 2 prompts needs 6 of them, and x\.arrow has 4 different ones"):
        rows(3)
