"""Problems of arithmetic with worked answers: a task judged by a verifier, which the right answer alone satisfies.

A problem asks for a sum, or which of two numbers is larger, one of which may be a sum. Its steps are its additions and
the comparison. A worked answer writes each step down digit by digit; the others in the rows for SFT are shortcuts, the
result alone, so a model trained on them knows two ways to answer, and is not told which is better.

    47+85+16=?               larger: 47+85 or 120?
    7+5=12                   7+5=12
    4+8+1=13                 4+8+1=13
    132+16                   132 or 120
    2+6=8                    1=1
    3+1=4                    3>2
    1+0=1                    so 132
    so 148

Each problem belongs to one split by a hash of it and the seed, so none is in two, whatever the kinds and row counts.
Each kind and split draws from its own generator: more rows of one leave the others' bytes alone.
"""

import hashlib
import random
from collections.abc import Iterator
from itertools import zip_longest
from typing import NamedTuple

from stages.lib.command.errors import StageError
from stages.lib.data.conversations import assistant, user
from stages.lib.data.prepared_rows import PreparedRow, Split
from stages.lib.data.prompts import Prompt
from stages.lib.rl.rewards.final_answer import score_final_answer
from stages.lib.settings.task_sources import ArithmeticSettings
from stages.lib.tasks.task import TASK

NAME = "arithmetic"
MARK = "so "  # before the final answer
HELD_OUT_SHARE = 0.05  # of the problems, in test and in validation each; train has the rest


class Problem(NamedTuple):
    """A question, the lines in which it is worked, and the answer."""

    question: str
    lines: list[str]
    answer: int


def rows(settings: ArithmeticSettings, seed: int) -> Iterator[PreparedRow]:
    """Rows for SFT, if there are to be any, and prompts, in all splits; equal arguments give equal rows."""
    sizes: dict[Split, tuple[int, int]] = {
        "train": (settings.sft_rows, settings.prompt_rows),
        "validation": (settings.validation_rows,) * 2,
        "test": (settings.test_rows,) * 2,
    }
    for split, (sft, prompts) in sizes.items():
        if settings.sft_rows:
            rng = random.Random(f"{seed}-{NAME}-sft-{split}")
            for problem in distinct_problems(rng, split, sft, settings, seed):
                messages = [user(problem.question), assistant(write_answer(rng, problem, settings.shortcuts))]
                yield PreparedRow("sft", split, {"messages": messages})
        rng = random.Random(f"{seed}-{NAME}-prompts-{split}")
        for problem in distinct_problems(rng, split, prompts, settings, seed):
            facts = {TASK: NAME, "answer": str(problem.answer)}
            yield PreparedRow("prompts", split, {"prompt": [user(problem.question)], "facts": facts})


def known(_settings: ArithmeticSettings, _seed: int) -> dict[str, float]:
    """Nothing: there are no pairs."""
    return {}


def grade(prompt: Prompt, response: str) -> float:
    """1 if the response gives the right answer and no other, else 0. Raises StageError if the facts have no answer."""
    answer = prompt.facts.get("answer")
    if not isinstance(answer, str) or not answer.isdecimal():
        raise StageError(f"expected a whole number as text in the fact answer, found {answer!r}")
    return score_final_answer(response, answer, MARK)


def distinct_problems(
    rng: random.Random, split: Split, count: int, settings: ArithmeticSettings, seed: int
) -> Iterator[Problem]:
    """Yield `count` problems of the split, no two alike."""
    seen: set[str] = set()
    while len(seen) < count:
        problem = draw_problem(rng, settings)
        if problem.question not in seen and split_of_problem(problem.question, seed) == split:
            seen.add(problem.question)
            yield problem


def split_of_problem(question: str, seed: int) -> Split:
    """The split that a question belongs to."""
    digest = hashlib.sha256(f"{seed}-{NAME}-{question}".encode()).digest()
    place = int.from_bytes(digest[:4], "big") / 2**32
    if place < HELD_OUT_SHARE:
        return "test"
    return "validation" if place < 2 * HELD_OUT_SHARE else "train"


def draw_problem(rng: random.Random, settings: ArithmeticSettings) -> Problem:
    """A sum of steps + 1 numbers, or a comparison of a sum of as many as steps with a number near it."""
    steps = rng.randint(settings.fewest_steps, settings.most_steps)
    largest = 10**settings.digits - 1
    is_sum = rng.random() < 0.5
    first, *others = (rng.randint(1, largest) for _ in range(steps + is_sum))
    question, total, lines = str(first), first, []
    for number in others:
        lines += [*([f"{total}+{number}"] if lines else []), *column_sums(total, number)]
        question, total = f"{question}+{number}", total + number
    if is_sum:
        return Problem(f"{question}=?", lines, total)
    other = total
    while other == total:
        other = rng.randint(max(1, total - largest // 3), total + largest // 3) if others else rng.randint(1, largest)
    lines += [*([f"{total} or {other}"] if lines else []), *digits_compared(total, other)]
    return Problem(f"larger: {question} or {other}?", lines, max(total, other))


def column_sums(first: int, second: int) -> list[str]:
    """An addition column by column from the right, each with what is carried into it: 4+8+1=13."""
    lines, carried = [], 0
    for one, other in zip_longest(str(first)[::-1], str(second)[::-1], fillvalue="0"):
        total = int(one) + int(other) + carried
        lines.append(f"{one}+{other}{'+1' * carried}={total}")
        carried = total // 10
    return lines


def digits_compared(first: int, second: int) -> list[str]:
    """A comparison digit by digit from the left, up to the first that differ: 1=1, 3>2."""
    width, lines = len(str(max(first, second))), []
    for one, other in zip(f"{first:0{width}}", f"{second:0{width}}", strict=True):
        lines.append(f"{one}{'=' if one == other else '>' if one > other else '<'}{other}")
        if one != other:
            break
    return lines


def write_answer(rng: random.Random, problem: Problem, shortcuts: float) -> str:
    """The worked answer, or with probability `shortcuts` the result alone."""
    lines = [] if rng.random() < shortcuts else problem.lines
    return "\n".join([*lines, f"{MARK}{problem.answer}"])
