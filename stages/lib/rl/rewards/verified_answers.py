"""The reward for a right final answer, compared as text in the stage's own process: it takes microseconds."""

from collections.abc import Sequence

from stages.lib.rl.episodes import Episode
from stages.lib.rl.rewards.final_answer import score_final_answer
from stages.lib.rl.rewards.scoring import Failure, RewardScore
from stages.lib.settings.rewards import FinalAnswerReward


class FinalAnswer:
    """1 for a finished response whose one final answer is that of its row's facts, else 0."""

    def __init__(self, settings: FinalAnswerReward) -> None:
        self.settings = settings

    def __call__(self, episodes: Sequence[Episode]) -> list[RewardScore]:
        return [self._of(episode) for episode in episodes]

    def _of(self, episode: Episode) -> RewardScore:
        answer = episode.prompt.facts.get(self.settings.answer)
        if isinstance(answer, bool) or not isinstance(answer, str | int):
            found = "none" if answer is None else type(answer).__name__
            return Failure(
                "row", f"expected a text or a whole number in the fact {self.settings.answer}, found {found}"
            )
        return episode.ended * score_final_answer(episode.text, str(answer).strip(), self.settings.mark)
