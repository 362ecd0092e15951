"""A prompt that a policy answers, with what its source knows of it."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Prompt(NamedTuple):
    """One row of the prompts' token table."""

    row: int  # line of the prepared file, 0-based; part of the identity of a response's random numbers
    ids: list[int]
    messages: list[dict[str, str]]
    facts: dict[str, Any]  # what grades and rewards may look at: the task's name, an answer, …


def prompts_of(columns: Mapping[str, list]) -> list[Prompt]:
    """The prompts of rows of a token table, as `table[rows]` gives them."""
    return [Prompt(row, ids, [], {}) for row, ids in zip(columns["row"], columns["prompt_ids"], strict=True)]
