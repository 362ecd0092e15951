"""The jobs that are timed beside TRL: their rows, our steps on them, and what the table says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import against_trl, our_steps, trl_jobs
from benchmarks.trl_jobs import JOBS, Job, Order, encoded, texts_of
from stages.lib.command.errors import StageError

PAIRS = [
    {
        "prompt": f"Name {count} of the colours that a painter mixes for a morning sky.",
        "chosen": "Blue, " * count + "and white.",
        "rejected": "No.",
    }
    for count in range(1, 7)
]


@pytest.fixture
def texts(tmp_path: Path) -> list[tuple[str, str, str]]:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return texts_of(path)


def test_pairs_are_prompts_with_both_replies(texts: list[tuple[str, str, str]]) -> None:
    prompt = "\n\nUser: Name 1 of the colours that a painter mixes for a morning sky.\n\nAssistant:"
    assert texts[0] == (prompt, " Blue, and white.", " No.")
    pairs = list(encoded(texts, 512))
    assert len(pairs) == len(PAIRS)
    assert {ids[-1] for pair in pairs for ids in (pair["chosen_ids"], pair["rejected_ids"])} == {0}
    assert list(encoded(texts, 5)) == []


@pytest.mark.parametrize("task", ["sft", "rm", "dpo", "dpo-live", "reference"])
def test_our_steps_are_timed(
    task: trl_jobs.Task, texts: list[tuple[str, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(trl_jobs.LLAMA, layers=1, hidden=16, intermediate=16)
    monkeypatch.setattr(trl_jobs, "LLAMA", tiny)
    monkeypatch.setattr(our_steps, "matrix_flops", lambda: 1e9)
    trl_jobs.write_models(tmp_path)
    order = Order(task, 2, 1, 2, 1, 1e-4, 0.1, str(tmp_path), "", "")
    found = our_steps.measure(order, list(encoded(texts, 512)))
    assert len(found["seconds"]) == (1 if task == "reference" else 2)
    assert len(found["losses"]) == (2 * len(PAIRS) if task == "reference" else 3)
    assert all(seconds > 0 for seconds in found["seconds"])
    if task.startswith("dpo"):
        assert found["losses"][0] == pytest.approx(0.6931, abs=1e-4)
    result = against_trl.Result("own", Job(task, 2), list(encoded(texts, 512)), [found], [found])
    assert against_trl.difference(result) == 0
    assert "| 1.00 | 1.00 |" in against_trl.line_of(result)


def test_a_job_must_be_known_and_have_its_rows(tmp_path: Path) -> None:
    assert against_trl.chosen(None) == [*JOBS]
    assert against_trl.chosen(["rm-8"]) == [Job("rm", 8)]
    with pytest.raises(StageError, match="--only rm is not one of: sft-8, "):
        against_trl.chosen(["rm"])
    with pytest.raises(StageError, match="rm-8 needs 8 pairs within the length, and there are 0"):
        against_trl.timed(Job("rm", 8), "own", [], tmp_path, tmp_path, rounds=1, steps=3, threads=1)
