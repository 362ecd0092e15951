"""What a task is: where its rows come from, and how good a response to one of its prompts is.

A task is a module of these three functions, and stands in `stages.lib.tasks.table`. Its prompts carry its name in their
facts, beside whatever its grading needs, so that they can be mixed with those of other tasks and of none.
"""

from collections.abc import Iterator
from typing import Any, Protocol

from stages.lib.data.prepared_rows import PreparedRow
from stages.lib.data.prompts import Prompt

TASK = "task"  # the fact that names a prompt's task


class Task(Protocol):
    """Rows, what is known of them, and grades."""

    def rows(self, settings: Any, seed: int, /) -> Iterator[PreparedRow]:
        """The prepared rows of all kinds and splits; equal arguments give equal rows.

        The facts of a prompt are `{"task": its name, …}`.
        """

    def known(self, settings: Any, seed: int, /) -> dict[str, float]:
        """Metrics of the rows that only who made them can tell, such as the best accuracy that labels allow."""

    def grade(self, prompt: Prompt, response: str, /) -> float:
        """How good the text of a response is, on the task's own scale; more is better.

        Raises:
            StageError: the prompt's facts are not those of this task.
        """
