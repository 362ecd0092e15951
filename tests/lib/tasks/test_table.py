"""The table of tasks: a prompt is graded by its own task, and no training stage sees any of them."""

import pytest

from stages.lib.command.errors import StageError
from stages.lib.data.prompts import Prompt
from stages.lib.operations.code_closure import MANIFESTS
from stages.lib.tasks.table import TASKS, grades, require_known_tasks
from tests.lib.tasks import sums
from tests.lib.tasks.test_film_gold import FACTS, GOOD
from tests.pipeline.graph import ROOT, code_of

TASKS_ROOM = "stages/lib/tasks/"
TRAINING = [path.stem for path in (ROOT / "stages").glob("train_*.py")] + ["ref_logprobs", "sample_pairs", "pass_rates"]


def prompt(row, **facts):
    return Prompt(row, [1], [{"role": "user", "content": "?"}], facts)


FILM, SUM, NONE = prompt(4, task="film_reviews", **FACTS), prompt(7, task="sums", answer=12), prompt(9, answer=12)


def test_each_prompt_is_graded_by_its_own_task(monkeypatch):
    monkeypatch.setitem(TASKS, "sums", sums)
    prompts, responses = [FILM, SUM, NONE, SUM], [GOOD, "it is 12.", "it is 12.", "it is 13."]
    require_known_tasks(prompts, "eval.arrow")
    assert grades(prompts, responses, "eval.arrow") == [5.0, 1.0, None, 0.0]


@pytest.mark.parametrize("name", ["film_review", "", None, 3, ["film_reviews"]])
def test_an_unknown_task_is_named_with_its_row(name):
    with pytest.raises(StageError) as refused:
        require_known_tasks([FILM, NONE, prompt(11, task=name)], "eval.arrow")
    assert str(refused.value).startswith(f"eval.arrow, row 11: the facts name the task {name!r}, which is none")
    assert ("did you mean 'film_reviews'?" in str(refused.value)) == (name in ("film_review", ["film_reviews"]))


def test_facts_that_a_task_cannot_read_are_named_with_their_row():
    wrong = prompt(5, task="film_reviews", **FACTS | {"genre": "opera"})
    with pytest.raises(StageError, match=r"^eval\.arrow, row 5: the fact genre 'opera' is not one of: thriller"):
        grades([FILM, wrong], [GOOD, GOOD], "eval.arrow")


def test_stages_that_know_tasks_are_found_by_their_code():
    for stage in ("prepare_data", "evaluate"):
        assert f"{TASKS_ROOM}film_gold.py" in code_of(stage)


@pytest.mark.parametrize("stage", TRAINING)
def test_no_training_stage_runs_the_code_of_a_task(stage):
    """Neither by an import of its own nor by one of what it imports, now and as the manifests in Git record it."""
    assert [file for file in code_of(stage) if file.startswith(TASKS_ROOM)] == []
    assert TASKS_ROOM not in (ROOT / MANIFESTS / f"{stage}.txt").read_text(encoding="utf-8")
