"""Rewards that are arithmetic on the tokens of a response: by its length, and by what in it is repeated."""

import math
from collections.abc import Sequence

from stages.lib.rl.episodes import Episode
from stages.lib.rl.rewards.scoring import Failure, RewardScore
from stages.lib.settings.rewards import CosineLengthReward, OverlongReward, RepetitionReward

RIGHT_ABOVE = 0.5  # of the score of the reward that says what is right


class CosineLength:
    """Along a cosine from `from` at length 0 to `to` at the longest; right and wrong answers have their own ends.

        R = to + ½ (from − to) (1 + cos(π · length / longest))        arXiv 2502.03373, section 3.1

    An answer that could not be judged is wrong; where nothing judges, it has no say.
    """

    def __init__(self, settings: CosineLengthReward, max_new_tokens: int) -> None:
        self.settings = settings
        self.longest = settings.longest or max_new_tokens
        self.judged_by = settings.judged_by

    def __call__(self, episodes: Sequence[Episode], scores: Sequence[RewardScore]) -> list[float | None]:
        return [self._of(len(episode.ids), score) for episode, score in zip(episodes, scores, strict=True)]

    def _of(self, length: int, score: RewardScore) -> float | None:
        if score is None:
            return None
        if length >= self.longest:
            return self.settings.exceeding
        is_right = not isinstance(score, Failure) and score > RIGHT_ABOVE
        own = self.settings
        start, end = (own.right_from, own.right_to) if is_right else (own.wrong_from, own.wrong_to)
        return end + (start - end) * (1 + math.cos(math.pi * length / self.longest)) / 2


class Repetition:
    """−penalty · (1 − distinct n-grams / n-grams) of a response's tokens; 0 for fewer than n of them.

    arXiv 2502.03373 takes each repeated n-gram's tokens off by itself; this is one number, as in open-r1.
    """

    def __init__(self, settings: RepetitionReward) -> None:
        self.settings = settings

    def __call__(self, episodes: Sequence[Episode]) -> list[float]:
        return [-self.settings.penalty * repeated_share(episode.ids, self.settings.n) for episode in episodes]


def repeated_share(ids: Sequence[int], n: int) -> float:
    """The share of a sequence's n-grams that are the same as an earlier one; 0 where there are none."""
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class Overlong:
    """−penalty · min(max(length − (longest − buffer), 0), buffer) / buffer: DAPO, arXiv 2503.14476, Eq 13."""

    def __init__(self, settings: OverlongReward, max_new_tokens: int) -> None:
        self.settings = settings
        self.longest = settings.longest or max_new_tokens

    def __call__(self, episodes: Sequence[Episode]) -> list[float]:
        buffer, penalty = self.settings.buffer, self.settings.penalty
        return [
            -penalty * min(max(len(episode.ids) - (self.longest - buffer), 0), buffer) / buffer for episode in episodes
        ]
