"""Rewards that are functions in worker processes: the user's own, and the verifiers of answers and of forms."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from stages.lib.command.errors import StageError
from stages.lib.compute.processes import Processes
from stages.lib.operations.run_log import note_versions
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rewards.scoring import RewardError, RewardScore, told_episode
from stages.lib.rl.rewards.worker_pool import Arguments, WorkerPool
from stages.lib.settings.rewards import FormatReward, FunctionReward, MathReward

if TYPE_CHECKING:  # which worker processes import, and so the manifests of stages have them
    from stages.lib.rl.rewards import math_answer, response_form  # noqa: F401

OWN = "stages.lib.rl.rewards"


class PooledReward:
    """A reward that a pool of processes scores, for the main process of a launch, which tells the others.

    Args:
        arguments: of the function, for an episode.
    """

    def __init__(self, pool: WorkerPool, arguments: Callable[[Episode], Arguments], processes: Processes) -> None:
        self.pool, self.arguments, self.processes = pool, arguments, processes

    def __call__(self, episodes: Sequence[Episode]) -> list[RewardScore]:
        try:
            found = self.processes.in_main(lambda: self._scores(episodes))
        except StageError as error:
            raise RewardError(str(error)) from None
        return self.processes.broadcast(found) or []

    def _scores(self, episodes: Sequence[Episode]) -> list[RewardScore]:
        scores = self.pool.scores([self.arguments(episode) for episode in episodes])
        note_versions(self.pool.versions)
        return scores


def user_function(settings: FunctionReward, processes: Processes, workers: int) -> PooledReward:
    """A function of `rewards/`, which is given whatever it names of what is known of a response."""
    module, function = module_and_function(settings.path)
    stop = settings.missing == "stop"
    pool = WorkerPool(module, function, settings.seconds, workers, settings.path, stop=stop)
    return PooledReward(pool, all_arguments, processes)


def module_and_function(path: str) -> tuple[str, str]:
    """The dotted module and the function of a path such as rewards/example.py:score."""
    file, _, function = path.partition(":")
    return file.removesuffix(".py").replace("/", "."), function


def all_arguments(episode: Episode) -> dict[str, Any]:
    """All that a user's function may name."""
    prompt = episode.prompt
    return {
        "prompt": prompt.shown,  # messages, or text
        "completion": episode.text,
        "prompt_ids": prompt.ids,
        "completion_ids": episode.ids,
        "ended": episode.ended,
        "sample": episode.sample,
        "row": prompt.row,
        "source": prompt.source,
        "facts": prompt.facts,
    }


def math_verifier(settings: MathReward, processes: Processes, workers: int) -> PooledReward:
    """1 for the right answer."""

    def arguments(episode: Episode) -> dict[str, Any]:
        text, read = episode.text, settings.read
        if settings.answer_after is not None and read == "after":
            _, mark, after = text.rpartition(settings.answer_after)
            text, read = after if mark else "", "anywhere"
        return {"completion": text, "answer": right_answer_of(episode, settings), "read": read}

    stop = settings.missing == "stop"
    pool = WorkerPool(f"{OWN}.math_answer", "score_answer", settings.seconds, workers, "math-verify", stop=stop)
    return PooledReward(pool, arguments, processes)


def right_answer_of(episode: Episode, settings: MathReward) -> str:
    """The text of the right answer in a row's facts. Raises StageError if there is none."""
    fact = episode.prompt.facts.get(settings.answer)
    if isinstance(fact, bool) or not isinstance(fact, str | int | float):
        found = "none" if fact is None else type(fact).__name__
        raise StageError(
            f"{told_episode(episode)}: expected a text or a number in the fact {settings.answer}, found {found}"
        )
    text = str(fact)
    if settings.answer_after is None:
        return text.strip()
    _, mark, after = text.rpartition(settings.answer_after)
    if not mark:
        raise StageError(f"{told_episode(episode)}: the fact {settings.answer} has no {settings.answer_after!r} in it")
    return after.strip()


def format_verifier(settings: FormatReward, processes: Processes, workers: int) -> PooledReward:
    """1 for a response of the form."""
    stop = settings.missing == "stop"
    pool = WorkerPool(f"{OWN}.response_form", "score_form", settings.seconds, workers, "format", stop=stop)
    return PooledReward(pool, lambda episode: {"completion": episode.text, "pattern": settings.pattern}, processes)
