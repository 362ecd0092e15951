"""Whether a response's answer equals the right one, by math-verify; runs in a worker process (`function_worker.py`).

math-verify's own time-outs raise SIGALRM, which works in the main thread alone, and its defaults turn whatever it
raises into "wrong". Here both are off: the process is ended by who waits for it, and what is raised is told.
"""

import logging
from functools import cache
from typing import Any, Literal

from math_verify import parse, verify
from math_verify.parser import LatexExtractionConfig

BOXED = "\\boxed"
MARKS = ("$", BOXED, "\\(", "\\[")  # of a formula within a text
IN_BOX = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
for _module in ("parser", "grader", "utils"):  # which warn at each run that time-outs are off
    logging.getLogger(f"math_verify.{_module}").setLevel(logging.CRITICAL)


class UnreadableAnswerError(ValueError):
    """The right answer of a row is no mathematics: a fault of the row, not of the response."""

    kind = "row"


def score_answer(completion: str, answer: str, read: Literal["anywhere", "boxed"]) -> float:
    """1.0 or 0.0; an answer that cannot be found or read is wrong.

    Raises:
        UnreadableAnswerError: the right answer cannot be read.
    """
    right = right_answer(answer)  # read first: a broken row is told whatever the response says
    given = formula_in_box(completion) if read == "boxed" else formula_in(completion)
    return float(bool(given) and verify(right, given, timeout_seconds=None, raise_on_error=True))


@cache
def right_answer(text: str) -> list[Any]:
    is_marked = any(mark in text for mark in MARKS)
    try:
        found = formula_in(text) if is_marked else formula_in(f"${text}$")  # a formula as a whole
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UnreadableAnswerError(f"the right answer {text!r:.100} cannot be read as mathematics: {reason}") from None
    if not found:
        raise UnreadableAnswerError(f"the right answer {text!r} cannot be read as mathematics")
    return found


def formula_in(text: str) -> list[Any]:
    return parse(text, parsing_timeout=0, raise_on_error=True)


def formula_in_box(text: str) -> list[Any]:
    """What is in the last box of a text; nothing without one."""
    start = text.rfind(BOXED)
    if start < 0:
        return []
    return parse(text[start:], IN_BOX, fallback_mode="no_fallback", parsing_timeout=0, raise_on_error=True)
