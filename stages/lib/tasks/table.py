"""Every task by its name, and the grades of responses to prompts of whatever task."""

from collections.abc import Sequence

from stages.lib.command.errors import StageError
from stages.lib.command.quoted import nearest
from stages.lib.data.prompts import Prompt
from stages.lib.tasks import arithmetic, film_reviews
from stages.lib.tasks.task import TASK, Task

TASKS: dict[str, Task] = {"film_reviews": film_reviews, "arithmetic": arithmetic}


def require_known_tasks(prompts: Sequence[Prompt], where: str) -> None:
    """Raise a StageError, beginning with `where`, if the facts of a prompt name a task that is not in the table."""
    for prompt in prompts:
        name = prompt.facts.get(TASK, None)
        if TASK in prompt.facts and not (isinstance(name, str) and name in TASKS):
            guess = nearest(str(name), sorted(TASKS))
            raise StageError(
                f"{where}, row {prompt.row}: the facts name the task {name!r}, which is none{guess}; "
                f"known: {', '.join(TASKS)}; a prompt without a task leaves it out"
            )


def grades(prompts: Sequence[Prompt], responses: Sequence[str], where: str) -> list[float | None]:
    """The grade of each response by the task of its prompt, None where that has no task.

    Raises:
        StageError: a task cannot read its prompt's facts (it begins with `where` and names the row).
    """
    found: list[float | None] = []
    for prompt, response in zip(prompts, responses, strict=True):
        try:
            found.append(TASKS[prompt.facts[TASK]].grade(prompt, response) if TASK in prompt.facts else None)
        except StageError as error:
            raise StageError(f"{where}, row {prompt.row}: {error}") from None
    return found
