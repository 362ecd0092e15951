"""The gold utility of the synthetic film-review task: how good a review is as an answer to what was asked.

A prompt asks for a short review of a film of a genre, touching one aspect: its facts are
`{"film": "silver harbor", "genre": "thriller", "aspect": "music"}`. With words in lower case, the utility of a
response is a sum of terms, each of which saturates:

    u = title + genre + aspect + warmth - off_topic - repetition - length - stuffing - unfinished

    title       0.25 for each of the (two) title words that occurs                                     0 … 0.5
    genre       +0.5 if a word of the genre occurs; -0.5 if a word of another genre occurs             -0.5 … 0.5
    aspect      1.0 for the first distinct word of the aspect, 0.5 for the second                      0 … 1.5
    warmth      1.25 * (distinct warm words - distinct cold words), the difference clipped to ±2       -2.5 … 2.5
    off_topic   0.5 for each distinct word of another aspect, at most 2 of them                        0 … 1.0
    repetition  0.5 for each repeated word and each repeated bigram, those of function words aside     0 … 2.5
    length      0.25 for each word below 12 or above 28                                                0 … 3.0
    stuffing    10 * (share of scored words above 0.55) + 1.0 for each bigram of two scored words
                after the third such: a list of keywords is no review                                  0 … 4.5
    unfinished  0.5 if the text does not end with . ! or ?                                             0 … 0.5

A scored word is one of the title, of a genre, of an aspect, or warm or cold. The best review has u = 5.0, the empty
text -3.5, nothing less than -14.5. It counts words and does not parse: it is a yardstick for this task, not for prose.
The unit is one logit of preference at label temperature 1:
P(a preferred to b) = sigmoid((u_a - u_b) / temperature), the Bradley-Terry model (Bradley and Terry, 1952).

Labels and evaluation use this module; training never does.
"""

import math
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from stages.lib.command.errors import StageError


def split_words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GENRE_WORDS: dict[str, tuple[str, ...]] = {
    "thriller": ("thriller", "suspense", "danger"),
    "comedy": ("comedy", "jokes", "laughter"),
    "romance": ("romance", "kisses", "weddings"),
    "war": ("war", "soldiers", "battles"),
    "horror": ("horror", "ghosts", "screams"),
    "fantasy": ("fantasy", "dragons", "wizards"),
}
ASPECT_WORDS: dict[str, tuple[str, ...]] = {
    "acting": ("acting", "cast", "performance"),
    "music": ("music", "score", "melody"),
    "plot": ("plot", "story", "twist"),
    "pacing": ("pacing", "rhythm", "tempo"),
    "camera": ("camera", "lighting", "framing"),
    "ending": ("ending", "finale", "climax"),
}
WARM_ADJECTIVES = split_words(
    """wonderful lovely superb charming brilliant delightful moving beautiful excellent gentle splendid touching
    graceful radiant inspired"""
)
COLD_ADJECTIVES = split_words(
    "dull awful boring clumsy bland tired terrible weak lifeless poor dreadful tedious shabby hollow stale"
)
WARM_WORDS = frozenset((*WARM_ADJECTIVES, "gladly", "happily", "enjoyed", "loved"))
COLD_WORDS = frozenset((*COLD_ADJECTIVES, "regret", "avoid", "disliked", "hated"))
SCORED_WORDS = (WARM_WORDS | COLD_WORDS).union(*GENRE_WORDS.values(), *ASPECT_WORDS.values())
FUNCTION_WORDS = frozenset(
    split_words(
        """a about all an and as at but by every film for from full had has i in is it its my of on so some that the
        there they this to too very was were will with would you your"""
    )
)

TITLE_WORD_UTILITY = 0.25
GENRE_UTILITY = 0.5
FIRST_ASPECT_WORD_UTILITY, SECOND_ASPECT_WORD_UTILITY = 1.0, 0.5
WARMTH_UTILITY, WARMTH_LIMIT = 1.25, 2
OFF_TOPIC_PENALTY, OFF_TOPIC_LIMIT = 0.5, 2
REPETITION_PENALTY, REPETITION_LIMIT = 0.5, 5
SHORTEST_COMFORTABLE, LONGEST_COMFORTABLE = 12, 28
LENGTH_PENALTY, LENGTH_LIMIT = 0.25, 12
LARGEST_SCORED_SHARE, SCORED_SHARE_PENALTY = 0.55, 10.0
MOST_SCORED_BIGRAMS, SCORED_BIGRAM_PENALTY = 3, 1.0
STUFFING_LIMIT = 4.5
UNFINISHED_PENALTY = 0.5


def gold_utility(facts: dict[str, Any], response: str) -> float:
    """The gold utility (see the module's formula) of `response` to the prompt with facts `facts`; in [-14.5, 5.0].

    Raises:
        StageError: `facts` lacks film, genre or aspect, or names a genre or an aspect that the task does not have.
    """
    return math.fsum(gold_terms(facts, response).values())


def gold_terms(facts: dict[str, Any], response: str) -> dict[str, float]:
    """The signed terms that `gold_utility` sums, by name. Raises as `gold_utility` does."""
    check_facts(facts)
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)?", response.lower())
    return {
        **topic_terms(facts, set(words)),
        "warmth": warmth_term(set(words)),
        "repetition": -REPETITION_PENALTY * min(count_repetitions(words), REPETITION_LIMIT),
        "length": -LENGTH_PENALTY * min(words_outside_comfort(len(words)), LENGTH_LIMIT),
        "stuffing": -min(stuffing(facts, words), STUFFING_LIMIT),
        "unfinished": 0.0 if response.rstrip().endswith((".", "!", "?")) else -UNFINISHED_PENALTY,
    }


def check_facts(facts: dict[str, Any]) -> None:
    """Raise StageError unless these are the facts of a prompt of this task."""
    known = {"genre": GENRE_WORDS, "aspect": ASPECT_WORDS}
    for key in ("film", "genre", "aspect"):
        if not isinstance(facts.get(key), str):
            raise StageError(f"facts {facts!r}: expected the texts 'film', 'genre' and 'aspect'")
        if key in known and facts[key] not in known[key]:
            raise StageError(f"the fact {key} {facts[key]!r} is not one of: {', '.join(known[key])}")


def topic_terms(facts: dict[str, Any], words: set[str]) -> dict[str, float]:
    """The terms title, genre, aspect and off_topic of a response with this set of words."""
    genres = {name for name, group in GENRE_WORDS.items() if words.intersection(group)}
    aspects = {name: len(words.intersection(group)) for name, group in ASPECT_WORDS.items()}
    asked = aspects.pop(facts["aspect"])
    return {
        "title": TITLE_WORD_UTILITY * len(words.intersection(title_words(facts))),
        "genre": GENRE_UTILITY * ((facts["genre"] in genres) - bool(genres - {facts["genre"]})),
        "aspect": FIRST_ASPECT_WORD_UTILITY * (asked >= 1) + SECOND_ASPECT_WORD_UTILITY * (asked >= 2),
        "off_topic": -OFF_TOPIC_PENALTY * min(sum(aspects.values()), OFF_TOPIC_LIMIT),
    }


def title_words(facts: dict[str, Any]) -> list[str]:
    """The first two words of the title, all that titles of this task have."""
    return facts["film"].lower().split()[:2]


def warmth_term(words: set[str]) -> float:
    balance = len(words & WARM_WORDS) - len(words & COLD_WORDS)
    return WARMTH_UTILITY * max(-WARMTH_LIMIT, min(balance, WARMTH_LIMIT))


def count_repetitions(words: list[str]) -> int:
    """Occurrences after the first of a word that is no function word, and of a bigram."""
    content = [word for word in words if word not in FUNCTION_WORDS]
    # A bigram of two function words ("it is") recurs in good prose; the same word twice in a row never does.
    bigrams = [
        (left, right)
        for left, right in pairwise(words)
        if left == right or not FUNCTION_WORDS.issuperset((left, right))
    ]
    return len(content) - len(set(content)) + len(bigrams) - len(set(bigrams))


def words_outside_comfort(count: int) -> int:
    return max(SHORTEST_COMFORTABLE - count, count - LONGEST_COMFORTABLE, 0)


def stuffing(facts: dict[str, Any], words: list[str]) -> float:
    """The penalty, before its limit, for too large a share or too dense a row of scored words."""
    title = title_words(facts)
    scored = [word in SCORED_WORDS or word in title for word in words]
    share = sum(scored) / max(len(words), 1)
    bigrams = sum(left and right for left, right in pairwise(scored))
    too_large, too_dense = max(0.0, share - LARGEST_SCORED_SHARE), max(0, bigrams - MOST_SCORED_BIGRAMS)
    return SCORED_SHARE_PENALTY * too_large + SCORED_BIGRAM_PENALTY * too_dense


def preference_probability(utility_a: float, utility_b: float, temperature: float) -> float:
    """Bradley-Terry probability sigmoid((u_a - u_b) / temperature) that a is preferred to b; `temperature` > 0."""
    logit = (utility_a - utility_b) / temperature
    if logit < 0:  # the form that cannot overflow
        return math.exp(logit) / (1.0 + math.exp(logit))
    return 1.0 / (1.0 + math.exp(-logit))


def bayes_accuracy(pairs: Iterable[tuple[float, float]], temperature: float) -> float:
    """The best accuracy any reward model can expect on labels drawn from Bradley-Terry on these utilities.

    The best guess is the response of greater utility, right with probability sigmoid(|u_a - u_b| / temperature); the
    result is the mean of that over `pairs`. Raises ValueError if there are none.
    """
    best = [preference_probability(max(pair), min(pair), temperature) for pair in pairs]
    if not best:
        raise ValueError("the Bayes accuracy of no pairs is undefined")
    return math.fsum(best) / len(best)


def label_accuracy(pairs: Sequence[tuple[float, float]]) -> float:
    """How often the utility itself agrees with the labels that were drawn: its accuracy as a reward model.

    It lies around `bayes_accuracy`, by what chance made of these labels. A tie counts half.

    Args:
        pairs: the utilities of the chosen and of the rejected response of each pair, at least one.
    """
    return math.fsum((chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in pairs) / len(pairs)
