"""Which replies to a prompt are paired, by rules worked out by hand; what is left out is counted."""

from collections import Counter

import pytest

from stages.lib.rl.ranked_replies import Pair, ScoredReply, best_reply, pairs_of
from stages.lib.settings.sample_pairs import AllPairs, BestAndWorst, BestOfN

UNFINISHED = "replies_unfinished"


def replies(*scores: float, unfinished: tuple[int, ...] = (), texts: str = "abcdefgh") -> list[ScoredReply]:
    """One for each score, with a text of its own unless `texts` says otherwise."""
    return [
        ScoredReply([place + 1], texts[place], place not in unfinished, score) for place, score in enumerate(scores)
    ]


def made(rule: BestAndWorst | AllPairs, given: list[ScoredReply]) -> tuple[list[Pair], dict[str, int]]:
    dropped: Counter[str] = Counter()
    return pairs_of(given, rule, dropped), {reason: count for reason, count in dropped.items() if count}


def best(least_gap: float = 0.0, unfinished: str = "drop") -> BestAndWorst:
    return BestAndWorst.model_validate({"type": "best_and_worst", "least_gap": least_gap, "unfinished": unfinished})


def every(least_gap: float = 0.0, unfinished: str = "drop") -> AllPairs:
    return AllPairs.model_validate({"type": "all_pairs", "least_gap": least_gap, "unfinished": unfinished})


@pytest.mark.parametrize(
    ("rule", "given", "pairs", "dropped"),
    [
        (best(), replies(0.5, 2.0, -1.0, 1.0), [(1, 2)], {}),
        (best(), replies(2.0, 2.0, -1.0, -1.0), [(0, 2)], {}),  # the first of equals
        (best(), replies(1.0, 1.0, 1.0), [], {"pairs_of_equal_scores": 1}),
        (best(3.5), replies(2.0, -1.0), [], {"pairs_below_least_gap": 1}),
        (best(3.0), replies(2.0, -1.0), [(0, 1)], {}),  # just far enough
        # The same words are one reply, the first; but one that was cut off is not the one that ended.
        (best(), replies(1.0, 3.0, 2.0, texts="aab"), [(2, 0)], {"replies_identical": 1}),
        (best(), replies(1.0, 3.0, texts="aa"), [], {"replies_identical": 1}),
        (best(), replies(5.0, 1.0, 0.0, -5.0, unfinished=(0, 3)), [(1, 2)], {UNFINISHED: 2}),
        (best(unfinished="rejected"), replies(5.0, 1.0, 0.0, -5.0, unfinished=(0, 3)), [(1, 3)], {}),
        (best(unfinished="rejected"), replies(5.0, 1.0, unfinished=(0,)), [], {"pairs_below_least_gap": 1}),
        (best(unfinished="rejected"), replies(5.0, 1.0, unfinished=(0, 1)), [], {}),
        (best(unfinished="rejected"), replies(5.0, 1.0, unfinished=(1,), texts="aa"), [(0, 1)], {}),
        (every(), replies(1.0, 3.0, 2.0), [(1, 0), (2, 0), (1, 2)], {}),
        (every(1.5), replies(1.0, 3.0, 2.0), [(1, 0)], {"pairs_below_least_gap": 2}),
        (every(), replies(1.0, 1.0, 2.0), [(2, 0), (2, 1)], {"pairs_of_equal_scores": 1}),
        (every(), replies(3.0, 2.0, 1.0, unfinished=(0,)), [(1, 2)], {UNFINISHED: 1}),
        (every(unfinished="rejected"), replies(3.0, 2.0, 1.0, unfinished=(0, 2)), [(1, 2)], {}),
    ],
)
def test_pairs_by_hand(
    rule: BestAndWorst | AllPairs, given: list[ScoredReply], pairs: list[tuple[int, int]], dropped: dict[str, int]
) -> None:
    assert made(rule, given) == (pairs, dropped)


@pytest.mark.parametrize(
    ("least", "given", "place", "dropped"),
    [
        (None, replies(0.5, 2.0, -1.0), 1, {}),
        (None, replies(2.0, 2.0), 0, {}),
        (None, replies(0.5, 2.0, 1.0, unfinished=(1,)), 2, {UNFINISHED: 1}),
        (None, replies(0.5, unfinished=(0,)), None, {UNFINISHED: 1}),
        (None, replies(0.5, 0.6, texts="aa"), 0, {"replies_identical": 1}),
        (1.0, replies(0.0, 1.0, 1.0), 1, {}),
        (1.0, replies(0.0, 0.9), None, {"best_replies_below_least_score": 1}),
        (1.0, replies(0.0, 1.0, unfinished=(1,)), None, {"best_replies_below_least_score": 1, UNFINISHED: 1}),
        (1.0, replies(1.0, unfinished=(0,)), None, {UNFINISHED: 1}),
    ],
)
def test_the_best_by_hand(
    least: float | None, given: list[ScoredReply], place: int | None, dropped: dict[str, int]
) -> None:
    counts: Counter[str] = Counter()
    rule = BestOfN.model_validate({"type": "best_of_n", "least_score": least})
    assert best_reply(given, rule, counts) == place
    assert {reason: count for reason, count in counts.items() if count} == dropped
