"""What is written of rollouts, and what it adds up to."""

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from stages.lib.data.prompts import Prompt
from stages.lib.rl import rollout_log
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rollout_log import RolloutLog
from stages.lib.rl.rollouts import Rollouts


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    words = Tokenizer(models.WordLevel({"<end>": 0, "good": 1, "film": 2}, unk_token="<end>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = "none"
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


KL = torch.tensor([[0.25, 0.25, 0.0], [-0.5, 0.125, 0.125]])  # sums to 0.5 and -0.25


def phase(scores: list[float]) -> Rollouts:
    """Two responses, of which the first ends."""
    prompts = [Prompt(7, [1], [], {}), Prompt(4, [2], [], {})]
    ended = Episode(prompts[0], [1, 0], "good", True, 0, None, [True] * 2)
    cut = Episode(prompts[1], [2, 1, 2], "film good film", False, 1, None, [True] * 3)
    mask, numbers = torch.tensor([[True, True, False], [True, True, True]]), torch.zeros(2, 3)
    return Rollouts([ended, cut], torch.tensor(scores), numbers, mask, *[numbers] * 4)


def test_each_response_is_a_line_and_first_and_last_phase_are_averaged(model_folder: Path, tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "rollouts.jsonl", model_folder)
    for iteration, scores in enumerate(([1.0, 2.0], [8.0, 9.0], [-1.0, 0.0])):
        log.append(iteration, phase(scores), KL)
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["row"], line["score"]) for line in lines[:3]] == [(1, 7, 1), (1, 4, 2), (2, 7, 8)]
    assert lines[0]["response_ids"] == [1, 0]
    assert lines[0]["response"] == "good <end>"
    assert [line["ended"] for line in lines[:2]] == [True, False]
    assert [line["kl"] for line in lines[:2]] == [0.5, -0.25]
    assert log.results() == {
        "rollouts": 6,
        "first_score_mean": 1.5,
        "first_kl_mean": 0.125,
        "first_ended_mean": 0.5,
        "last_score_mean": -0.5,
        "last_kl_mean": 0.125,
        "last_ended_mean": 0.5,
    }
    assert log.samples(phase([1.0, 2.0]), KL, 1) == ["    score +1.00  kl +0.50  'good <end>'"]


def test_a_process_without_a_file_writes_nothing(model_folder: Path, tmp_path: Path) -> None:
    log = RolloutLog(None, model_folder)
    log.append(0, phase([1.0, 2.0]), KL)
    log.publish(tmp_path / "rollouts.parquet")
    assert log.results() == {}
    assert not (tmp_path / "rollouts.parquet").exists()


def test_a_line_says_which_sample_it_is_where_there_are_several(model_folder: Path, tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "rollouts.jsonl", model_folder, with_samples=True)
    log.append(0, phase([1.0, 2.0]), KL)
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [(line["row"], line["sample"]) for line in lines] == [(7, 0), (4, 1)]


def test_a_table_of_all_responses_is_published(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_log, "ROWS_TOGETHER", 3)  # of four
    log = RolloutLog(tmp_path / "rollouts.jsonl", model_folder)
    parts = {"length": torch.tensor([0.5, math.nan])}
    first, second = (phase(scores)._replace(parts=parts) for scores in ([1.0, 2.0], [3.0, 4.0]))
    advantages = torch.tensor([[1.0, 3.0, 0.0], [-1.0, -2.0, -3.0]])
    log.append(0, first, KL, advantages)
    log.append(1, second, None, advantages)  # no reference
    for name in ("one", "two"):
        log.publish(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    rows = pq.read_table(tmp_path / "one").to_pylist()
    assert rows[0] == {
        "iteration": 1,
        "row": 7,
        "sample": 0,
        "source": "",
        "facts": "{}",
        "prompt": "good",
        "prompt_ids": [1],
        "response": "good <end>",
        "response_ids": [1, 0],
        "length": 2,
        "ended": True,
        "score": 1.0,
        "rewards/length": 0.5,
        "advantage": 2.0,
        "kl": 0.5,
    }
    assert [row["score"] for row in rows] == [1, 2, 3, 4]
    assert [row["rewards/length"] for row in rows] == [0.5, None, 0.5, None]
    assert [row["advantage"] for row in rows[:2]] == [2, -2]
    assert [row["kl"] for row in rows] == [0.5, -0.25, None, None]


def test_the_log_probs_of_sampler_and_policy_stand_side_by_side(model_folder: Path, tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "rollouts.jsonl", model_folder)
    ours, theirs = torch.tensor([[-1.0, -2, 0], [-3, -4, -5]]), torch.tensor([[-1.5, -2, 0], [-3, -4, -6]])
    log.append(0, phase([1.0, 2.0])._replace(logps=ours, engine_logps=theirs), KL)
    log.publish(tmp_path / "table")
    rows = pq.read_table(tmp_path / "table").to_pylist()
    assert [row["logps"] for row in rows] == [[-1, -2], [-3, -4, -5]]
    assert [row["engine_logps"] for row in rows] == [[-1.5, -2], [-3, -4, -6]]
