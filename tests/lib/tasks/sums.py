"""A toy task, all of it in one file: sums of small numbers, of which a response holds the right one or not."""

from collections.abc import Iterator
from typing import Any

from stages.lib.data.conversations import assistant, user
from stages.lib.data.prepared_rows import PreparedRow, preference_pair
from stages.lib.data.prompts import Prompt
from stages.lib.tasks.task import TASK


def rows(settings: dict[str, int], seed: int) -> Iterator[PreparedRow]:
    for split, first in (("train", seed), ("test", seed + settings["rows"])):
        for number in range(first, first + settings["rows"]):
            prompt, right, wrong = [user(f"what is {number} plus 2?")], f"it is {number + 2}.", f"it is {number}."
            yield PreparedRow("sft", split, {"messages": [*prompt, assistant(right)]})
            yield PreparedRow("preference", split, preference_pair(prompt, right, wrong))
            yield PreparedRow("prompts", split, {"prompt": prompt, "facts": {TASK: "sums", "answer": number + 2}})


def known(_settings: Any, _seed: int) -> dict[str, float]:
    return {"bayes_accuracy": 1.0}


def grade(prompt: Prompt, response: str) -> float:
    return float(str(prompt.facts["answer"]) in response)
