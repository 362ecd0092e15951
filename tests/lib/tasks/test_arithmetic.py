"""The task of arithmetic: its problems are right, worked as it says and divided once; one final answer is demanded."""

import json
import random
import re
from functools import cache
from itertools import combinations

import pytest

from stages.lib.command.errors import StageError
from stages.lib.command.params import build
from stages.lib.data.prompts import Prompt
from stages.lib.settings.declaration import block
from stages.lib.settings.task_sources import ArithmeticSettings
from stages.lib.tasks.arithmetic import column_sums, digits_compared, draw_problem, grade, rows

SIZES = {"sft_rows": 300, "prompt_rows": 300, "validation_rows": 60, "test_rows": 90}
SETTINGS = ArithmeticSettings(**block(ArithmeticSettings, **SIZES))
SPLITS = ("train", "validation", "test")


def rows_by_kind(settings: ArithmeticSettings, seed: int) -> dict[str, dict[str, list]]:
    found = {kind: {split: [] for split in SPLITS} for kind in ("sft", "prompts")}
    for row in rows(settings, seed):
        found[row.kind][row.split].append(row.values)
    return found


@cache
def generated() -> dict[str, dict[str, list]]:
    return rows_by_kind(SETTINGS, 17)


def questions(of: list) -> list[str]:
    return [(row["prompt"] if "prompt" in row else row["messages"])[0]["content"] for row in of]


def answer_to(question: str) -> int:
    """The answer as a reader of the question works it out."""
    if question.endswith("=?"):
        return sum(map(int, question[:-2].split("+")))
    one, other = question.removeprefix("larger: ").removesuffix("?").split(" or ")
    return max(sum(map(int, one.split("+"))), int(other))


def test_each_kind_and_split_has_its_size() -> None:
    sizes = {kind: {split: len(found) for split, found in own.items()} for kind, own in generated().items()}
    assert sizes == {kind: {"train": 300, "validation": 60, "test": 90} for kind in ("sft", "prompts")}


def test_answers_are_right_and_so_is_each_line() -> None:
    for row in generated()["prompts"]["train"]:
        assert row["facts"] == {"task": "arithmetic", "answer": str(answer_to(row["prompt"][0]["content"]))}
    for row in generated()["sft"]["train"]:
        question, answer = (message["content"] for message in row["messages"])
        *lines, last = answer.split("\n")
        assert last == f"so {answer_to(question)}"
        for line in lines:
            if "=" in line and "+" in line:
                numbers, _, total = line.partition("=")
                assert sum(map(int, numbers.split("+"))) == int(total)


def test_all_forms_of_problem_are_asked_about_as_often() -> None:
    rng = random.Random(3)
    forms = [re.sub(r"\d+", "n", draw_problem(rng, SETTINGS).question) for _ in range(4000)]
    shares = {form: forms.count(form) / len(forms) for form in set(forms)}
    expected = dict.fromkeys(("n+n=?", "n+n+n=?", "larger: n or n?", "larger: n+n or n?"), 0.25)
    assert shares == pytest.approx(expected, abs=0.03)  # four standard errors of 4,000 draws


def test_steps_by_hand() -> None:
    assert column_sums(47, 85) == ["7+5=12", "4+8+1=13"]
    assert column_sums(132, 16) == ["2+6=8", "3+1=4", "1+0=1"]
    assert column_sums(5, 97) == ["5+7=12", "0+9+1=10"]
    assert column_sums(9, 1) == ["9+1=10"]
    assert digits_compared(47, 85) == ["4<8"]
    assert digits_compared(132, 120) == ["1=1", "3>2"]
    assert digits_compared(7, 42) == ["0<4"]


def test_worked_answers_by_hand() -> None:
    worked = {
        question: answer
        for row in rows_by_kind(SETTINGS.model_copy(update={"shortcuts": 0.0}), 17)["sft"]["train"]
        for question, answer in [[message["content"] for message in row["messages"]]]
    }
    assert worked["80+88+86=?"] == "0+8=8\n8+8=16\n168+86\n8+6=14\n6+8+1=15\n1+0+1=2\nso 254"
    assert worked["larger: 62+43 or 92?"] == "2+3=5\n6+4=10\n105 or 92\n1>0\nso 105"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_shortcuts_are_a_share_of_the_answers(share: float) -> None:
    found = rows_by_kind(SETTINGS.model_copy(update={"shortcuts": share}), 17)["sft"]["train"]
    short = sum("\n" not in row["messages"][1]["content"] for row in found) / len(found)
    assert short == pytest.approx(share, abs=0.12 if share == 0.5 else 0)  # four standard errors of 300 draws


def test_no_problem_is_in_two_splits_nor_twice_in_a_file() -> None:
    of_split = {split: set() for split in SPLITS}
    for kind, own in generated().items():
        for split, found in own.items():
            asked = questions(found)
            assert len({*asked}) == len(asked), (kind, split)
            of_split[split] |= {*asked}
    assert not any(of_split[one] & of_split[other] for one, other in combinations(SPLITS, 2))


def test_harder_problems_have_more_steps_and_can_be_of_the_test_split_alone() -> None:
    harder = {"sft_rows": 0, "prompt_rows": 0, "validation_rows": 0, "fewest_steps": 3, "most_steps": 3}
    settings = ArithmeticSettings(**block(ArithmeticSettings, **harder, test_rows=50))
    assert settings.kinds == ("prompts",)
    found = [*rows(settings, 17)]
    assert {(row.kind, row.split) for row in found} == {("prompts", "test")}
    forms = {re.sub(r"\d+", "n", asked) for asked in questions([row.values for row in found])}
    assert forms == {"n+n+n+n=?", "larger: n+n+n or n?"}


def test_more_rows_of_one_kind_change_no_others() -> None:
    for name, kind in (("sft_rows", "sft"), ("prompt_rows", "prompts")):
        found = rows_by_kind(SETTINGS.model_copy(update={name: 320}), 17)
        for other, own in generated().items():
            assert found[other] | {"train": found[other]["train"][:300]} == own
            assert len(found[other]["train"]) == (320 if other == kind else 300)
    assert json.dumps([*rows(SETTINGS, 17)]) != json.dumps([*rows(SETTINGS, 18)])


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("so 132", 1.0),
        ("7+5=12\n4+8+1=13\nso 132 ", 1.0),
        ("so 131", 0.0),
        ("so 132.", 0.0),
        ("so 0132", 0.0),
        ("132", 0.0),
        ("so 131\nso 132", 0.0),  # two answers
        ("so 132\nso 132", 0.0),
        ("so 132 or 133", 0.0),
        ("so ", 0.0),
        ("", 0.0),
    ],
)
def test_one_final_answer_is_demanded(response: str, score: float) -> None:
    assert grade(Prompt(0, [1], [], {"task": "arithmetic", "answer": "132"}), response) == score


@pytest.mark.parametrize("facts", [{}, {"answer": 132}, {"answer": "so 132"}, {"answer": ""}])
def test_a_prompt_without_an_answer_is_refused(facts: dict) -> None:
    with pytest.raises(StageError, match="expected a whole number as text in the fact answer, found"):
        grade(Prompt(0, [1], [], facts), "so 132")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fewest_steps": 3}, r"fewest_steps \(3\) must be at most most_steps \(2\)"),
        ({"sft_rows": 0, "prompt_rows": 0, "validation_rows": 0, "test_rows": 0}, "are all 0, so there are no rows"),
        ({"digits": 1, "prompt_rows": 365}, "prompt_rows must be at most 364, or too few problems differ, found 365"),
        ({"digits": 1, "test_rows": 15}, "test_rows must be at most 14, or too few problems differ, found 15"),
        ({"shortcuts": 1.5}, "shortcuts must be at least 0 and at most 1, found 1.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict, message: str) -> None:
    small = {"sft_rows": 10, "prompt_rows": 10, "validation_rows": 1, "test_rows": 1}
    with pytest.raises(StageError, match=message):
        build(ArithmeticSettings, block(ArithmeticSettings, **small) | change, "arithmetic")
