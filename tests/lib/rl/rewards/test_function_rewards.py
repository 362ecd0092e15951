"""Reward functions in worker processes: what they are given, and what becomes of those that fail, hang or crash."""

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from stages.lib.command.errors import StageError
from stages.lib.compute.processes import Processes
from stages.lib.data.prompts import Prompt
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rewards.function_rewards import PooledReward, format_verifier, math_verifier, user_function
from stages.lib.rl.rewards.scoring import Failure
from stages.lib.rl.rewards.worker_pool import WorkerPool
from stages.lib.settings.declaration import block
from stages.lib.settings.rewards import FormatReward, FunctionReward, MathReward
from tests.tiny_models import CPU

ALONE = Processes(0, 1, CPU)
FUNCTIONS = """
import asyncio, math, os, subprocess, sys, time
from pathlib import Path
from rewards.shared import HALF

def told(prompt, completion, prompt_ids, completion_ids, facts, source, ended, sample, row):
    print("heard by nobody")
    given = [prompt, completion, prompt_ids, completion_ids, facts, source, ended, sample, row]
    rest = ["five", [1], [5, 9], {"answer": "5"}, "src", True, 0, 7]
    return given == [[{"role": "user", "content": "q"}], *rest]

class Untold(Exception):
    kind = 5
    def __str__(self): return self.nothing

def by_word(completion, **others):
    assert "facts" in others
    match completion:
        case "none": return None
        case "raise": raise ValueError("on\\npurpose")
        case "nan": return math.nan
        case "text": return "1.5"
        case "exit": os._exit(3)
        case "quit": sys.exit()
        case "hang": time.sleep(60)
        case "fork": os.fork()
        case "untold": raise Untold
        case "stdin": return len(input())
        case "child":
            Path("child").write_text(str(subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL).pid))
            time.sleep(60)
        case "spin":
            while True:
                try: time.sleep(60)
                except BaseException: pass
    return HALF

async def waiting(completion):
    await asyncio.sleep(60 if completion == "hang" else 0.2)
    return len(completion)

def unknown(completion, colour): ...

def needs_gold(completion):
    from stages.lib.tasks.film_gold import gold_utility
"""


def episode(text: str, answer: object = "5", row: int = 7) -> Episode:
    prompt = Prompt(row, [1], [{"role": "user", "content": "q"}], {"answer": answer}, {}, "src")
    return Episode(prompt, [5, 9], text, True, 0, None, [True] * 2)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "rewards").mkdir()
    (folder / "rewards/own.py").write_text(FUNCTIONS)
    (folder / "rewards/shared.py").write_text("HALF = 0.5\n")
    (folder / "rewards/broken.py").write_text("import no_such_package\n")
    return folder


def scores(
    project: Path, function: str, words: list[str], seconds: float = 20.0, workers: int = 1, missing: str = "skip"
) -> list:
    before = Path.cwd()
    os.chdir(project)
    settings = FunctionReward(**block(FunctionReward, path=f"rewards/{function}", seconds=seconds, missing=missing))
    reward = user_function(settings, ALONE, workers)
    try:
        return reward([episode(word) for word in words])
    finally:
        reward.pool.close()
        os.chdir(before)


def test_a_function_is_given_what_it_names(project: Path) -> None:
    assert scores(project, "own.py:told", ["five", "six"]) == [1.0, 0.0]


def test_failures_are_of_single_responses(project: Path) -> None:
    words = ["x", "none", "raise", "nan", "text", "exit", "quit", "y"]
    found = scores(project, "own.py:by_word", words)
    assert (found[0], found[1], found[7]) == (0.5, None, 0.5)
    assert math.isnan(found[3])
    assert {one.kind for one in found if isinstance(one, Failure)} == {"error"}
    told = [one.reason for one in found if isinstance(one, Failure)]
    assert told[0].startswith("ValueError: on purpose (rewards/own.py, line ")
    assert told[1].startswith("TypeError: the score must be a number or None, found str")
    assert told[2] == "its process ended with exit code 3"
    assert told[3].startswith("SystemExit")


def test_a_hung_process_is_killed_and_replaced(project: Path) -> None:
    """Also where it catches what is thrown at it; the others are scored meanwhile."""
    started = time.monotonic()
    found = scores(project, "own.py:by_word", ["spin", *["x"] * 6], seconds=2.0, workers=2)
    assert found == [Failure("timeout", "it took more than 2 s"), *[0.5] * 6]
    assert time.monotonic() - started < 30


def test_what_a_function_starts_answers_and_reads_nothing_and_ends_with_it(project: Path) -> None:
    """Nor does an error whose message cannot be made end its process."""
    found = scores(project, "own.py:by_word", ["fork", "untold", "stdin", "x", "child"], seconds=2.0)
    assert (found[0], found[3], found[4]) == (0.5, 0.5, Failure("timeout", "it took more than 2 s"))
    assert found[1].reason.startswith("Untold: its message cannot be read (AttributeError)")
    assert found[2].reason.startswith("EOFError")
    child = Path("/proc", (project / "child").read_text(), "stat")
    for _ in range(100):  # it has been killed, and may take a moment to end
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("what the function started still runs")


def test_a_failure_that_ends_the_run_is_not_waited_for_by_others(project: Path) -> None:
    started = time.monotonic()
    found = scores(project, "own.py:by_word", ["x", "raise", *["hang"] * 20], missing="stop")
    assert found[0] == 0.5
    assert found[1].reason.startswith("ValueError: on purpose")
    assert found[2:] == [None] * 20
    assert time.monotonic() - started < 15


def test_async_functions_run_side_by_side(project: Path) -> None:
    started = time.monotonic()
    found = scores(project, "own.py:waiting", ["a" * n for n in range(40)] + ["hang"], seconds=2.5)
    assert found == [*map(float, range(40)), Failure("timeout", "it took more than 2.5 s")]
    assert time.monotonic() - started < 30  # 8 s one after the other, and 4 for the last


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken.py:score", r"rewards/broken.py:score cannot be loaded: ModuleNotFoundError: No module named 'no_such"),
        ("own.py:nothing", r"rewards/own.py:nothing cannot be loaded: AttributeError: .*nothing"),
        ("own.py:unknown", r"rewards/own.py:unknown asks for colour, which there is not.*; there is completion, "),
    ],
)
def test_a_function_that_cannot_be_called_stops_the_run(project: Path, function: str, message: str) -> None:
    with pytest.raises(StageError, match=message):
        scores(project, function, ["x"])


def test_no_reward_function_sees_the_gold_utility(project: Path) -> None:
    (failure,) = scores(project, "own.py:needs_gold", ["x"])
    assert failure.kind == "error"
    assert "stages.lib.tasks" in failure.reason


def of_answers(pool: WorkerPool | None = None, **changed: Any) -> PooledReward:
    """With the processes of another one, since math-verify takes a second to load."""
    reward = math_verifier(MathReward(**block(MathReward, **changed)), ALONE, 1)
    reward.pool = pool or reward.pool
    return reward


def test_answers_are_compared_as_mathematics() -> None:
    cases = [
        ("The answer is 72.", "72", 1),
        ("so #### 1,000", "1000", 1),
        ("$\\frac{3}{4}$", "0.75", 1),
        ("it is $2x + 2$", "2(x+1)", 1),
        ("so 3/4", "\\frac{3}{4}", 1),
        ("$5", "$5", 1),
        ("no idea", "72", 0),
        ("\\boxed{71}", "72", 0),
        ("", "72", 0),
    ]
    reward = of_answers()
    assert reward([episode(text, answer) for text, answer, _ in cases]) == [right for *_, right in cases]
    for said in ("72", ""):
        (fault,) = reward([episode(said, "")])
        assert fault == Failure("row", fault.reason)
        assert "the right answer '' cannot be read as mathematics" in fault.reason
    with pytest.raises(StageError, match=r"row 7 .*expected a text or a number in the fact answer, found none"):
        reward([episode("72", None)])
    boxed = of_answers(reward.pool, read="boxed", answer_after="####")
    texts = ["\\boxed{1} or \\boxed{72}", "72", "\\boxed{72} or \\boxed{1}"]
    assert boxed([episode(text, "70 + 2 = 72 #### 72") for text in texts]) == [1, 0, 0]
    after = of_answers(reward.pool, read="after", answer_after="####")
    texts = ["pay $3.50 + $2\n#### 72", "72", "#### 3 or #### 72", "#### 72 or #### 3"]
    assert after([episode(text, "#### 72") for text in texts]) == [1, 0, 1, 0]
    with pytest.raises(StageError, match=r"the fact answer has no '####' in it"):
        boxed([episode("72", "72")])
    # What never ends is a time-out, and no wrong answer.
    reward.pool.seconds = 2.5
    found = reward([episode("72", "72"), episode("1", "72"), episode("$\\sum_{k=1}^{10^{12}} \\frac{1}{k}$", "72")])
    assert found == [1.0, 0.0, Failure("timeout", "it took more than 2.5 s")]


def test_a_form_is_that_of_the_whole_response() -> None:
    reward = format_verifier(FormatReward(**block(FormatReward, seconds=2.0)), ALONE, 1)
    whole = "<think>a\nb</think>\n<answer>c</answer>"
    assert reward([episode(text) for text in (whole, f"{whole} more", "<answer>c</answer>")]) == [1.0, 0.0, 0.0]
    slow = format_verifier(FormatReward(**block(FormatReward, pattern="(a+)+b")), ALONE, 1)
    slow.pool = reward.pool
    assert slow([episode("aab"), episode("a" * 40)]) == [1.0, Failure("timeout", "it took more than 2 s")]
