"""What is made of several replies to one prompt, each with a score: pairs of a better and a worse one, or the best."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

from stages.lib.settings.sample_pairs import AllPairs, BestAndWorst, BestOfN, PairRule

REPLIES_ALIKE, REPLIES_UNFINISHED = "replies_identical", "replies_unfinished"
PAIRS_EQUAL, PAIRS_CLOSE = "pairs_of_equal_scores", "pairs_below_least_gap"
PROMPTS_WITHOUT = "prompts_without_a_row"
BEST_BELOW = "best_replies_below_least_score"
REASONS = (REPLIES_ALIKE, REPLIES_UNFINISHED, PAIRS_EQUAL, PAIRS_CLOSE, BEST_BELOW, PROMPTS_WITHOUT)


class ScoredReply(NamedTuple):
    """One of the replies to a prompt."""

    ids: list[int]
    text: str
    ended: bool  # with EOS, rather than at the limit of new tokens
    score: float


class Pair(NamedTuple):
    """Two places in a list of replies."""

    chosen: int
    rejected: int


def best_reply(replies: Sequence[ScoredReply], rule: BestOfN, dropped: Counter[str]) -> int | None:
    """The place of the finished reply with the highest score, the first of equals; None if none is good enough."""
    places = finished(replies, different(replies, dropped), dropped)
    best = max(places, key=lambda place: replies[place].score, default=None)
    if best is not None and rule.least_score is not None and replies[best].score < rule.least_score:
        dropped[BEST_BELOW] += 1
        return None
    return best


def pairs_of(replies: Sequence[ScoredReply], rule: BestAndWorst | AllPairs, dropped: Counter[str]) -> list[Pair]:
    """The pairs of a prompt, in the order of their places; what is left out is added to `dropped` by reason."""
    places = different(replies, dropped)
    if rule.unfinished == "drop":
        places = finished(replies, places, dropped)
    candidates = all_pairs(replies, places) if isinstance(rule, AllPairs) else best_and_worst(replies, places)
    return [pair for pair in candidates if is_apart(replies, pair, rule, dropped)]


def different(replies: Sequence[ScoredReply], dropped: Counter[str]) -> list[int]:
    """The places of the replies that say something no earlier one says."""
    first = {(reply.text, reply.ended): place for place, reply in reversed([*enumerate(replies)])}
    dropped[REPLIES_ALIKE] += len(replies) - len(first)
    return sorted(first.values())


def finished(replies: Sequence[ScoredReply], places: Sequence[int], dropped: Counter[str]) -> list[int]:
    """Those of some places whose replies ended."""
    ended = [place for place in places if replies[place].ended]
    dropped[REPLIES_UNFINISHED] += len(places) - len(ended)
    return ended


def best_and_worst(replies: Sequence[ScoredReply], places: Sequence[int]) -> Iterator[Pair]:
    """The finished reply with the highest score against the lowest of the others, the first of equals each."""
    best = max((place for place in places if replies[place].ended), key=lambda at: replies[at].score, default=None)
    others = [place for place in places if place != best]
    if best is not None and others:
        yield Pair(best, min(others, key=lambda place: replies[place].score))


def all_pairs(replies: Sequence[ScoredReply], places: Sequence[int]) -> Iterator[Pair]:
    """Every two replies whose better one is finished; of equals the first is called the better one."""
    for one, other in combinations(places, 2):
        pair = Pair(one, other) if replies[one].score >= replies[other].score else Pair(other, one)
        if replies[pair.chosen].ended:
            yield pair


def is_apart(replies: Sequence[ScoredReply], pair: Pair, rule: PairRule, dropped: Counter[str]) -> bool:
    """Whether the scores of a pair are far enough apart; if not, its reason is counted."""
    gap = gap_of(replies, pair)
    if gap > 0 and gap >= rule.least_gap:
        return True
    dropped[PAIRS_CLOSE if gap else PAIRS_EQUAL] += 1
    return False


def gap_of(replies: Sequence[ScoredReply], pair: Pair) -> float:
    """By how much the chosen reply's score is above that of the rejected one."""
    return replies[pair.chosen].score - replies[pair.rejected].score
