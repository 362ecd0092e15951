"""Gold utilities worked by hand from the formula in the module's docstring."""

import math
from itertools import combinations

import pytest

from stages.lib.command.errors import StageError
from stages.lib.tasks.film_gold import (
    ASPECT_WORDS,
    COLD_WORDS,
    FUNCTION_WORDS,
    GENRE_WORDS,
    WARM_WORDS,
    bayes_accuracy,
    gold_utility,
    preference_probability,
)

FACTS = {"film": "silver harbor", "genre": "thriller", "aspect": "music"}
GOOD = (
    "silver harbor is a wonderful thriller film. the music is superb and the score feels gentle. "
    "i would gladly see it again."
)
MEDIOCRE = "it is a modest film. the music seems plain from start to end."
BAD = "silver harbor tells a dull tale of jokes. the cast is awful. the cast is awful."


@pytest.mark.parametrize(
    ("response", "terms"),
    [
        # title, genre, two words of the aspect, four warm words of which two count
        (GOOD, [0.5, 0.5, 1.5, 2.5]),
        (MEDIOCRE, [1.0]),
        # title, a comedy's word, two cold words, "cast", repeated: cast, awful, "the cast", "cast is", "is awful"
        (BAD, [0.5, -0.5, -2.5, -0.5, -2.5]),
        # 4 words, so 8 short; half of them scored
        ("The music is LOVELY.", [1.0, 1.25, -2.0]),
        ("the music is lovely", [1.0, 1.25, -2.0, -0.5]),
        # asked and wrong genre cancel; 12 words; "horror" and "thriller" are of different genres
        ("it is a thriller and it is also a horror film somehow!", [0.5 - 0.5]),
        # of three words of other aspects two count; a warm and a cold word cancel
        ("we noticed the plot, some cast and this tempo, so lovely or dull, then?", [-2 * 0.5]),
        # 30 words, so 2 long
        (" ".join(f"w{index}" for index in range(30)) + ".", [-0.5]),
        # 200 words: the length term stops at 12 words outside
        (" ".join(f"w{index}" for index in range(200)) + ".", [-3.0]),
        # 10 words; 6 scored: 10 * (0.6 - 0.55); 4 bigrams of scored words, one too many
        ("lovely superb charming brilliant wonderful and the music it was.", [1.0, 2.5, -0.5, -0.5, -1.0]),
        # function words may recur, also as a bigram ("it is"), but not twice in a row
        ("it is as it is and this was the film that they had.", []),
        ("it was the the the the film that they had on this.", [-0.5 * 2]),
        ("", [-3.0, -0.5]),
        ("\n", [-3.0, -0.5]),
    ],
)
def test_hand_worked_utilities(response, terms):
    assert gold_utility(FACTS, response) == pytest.approx(sum(terms))


def test_better_reviews_score_higher():
    assert gold_utility(FACTS, GOOD) > gold_utility(FACTS, MEDIOCRE) > gold_utility(FACTS, BAD)


def test_a_good_review_answers_its_own_prompt_only():
    own = gold_utility(FACTS, GOOD)
    assert gold_utility(FACTS | {"film": "broken tower"}, GOOD) == pytest.approx(own - 0.5)
    assert gold_utility(FACTS | {"genre": "war"}, GOOD) == pytest.approx(own - 2 * 0.5)
    assert gold_utility(FACTS | {"aspect": "plot"}, GOOD) == pytest.approx(own - 1.5 - 2 * 0.5)


@pytest.mark.parametrize(
    "degenerate",
    [
        "",
        "wonderful.",
        "wonderful " * 20 + ".",
        "the " * 20 + ".",
        "silver harbor thriller music score wonderful lovely superb charming brilliant gladly suspense.",
        "silver harbor. thriller. music. score. wonderful. lovely. the. of. and. is. a. to. in. it.",
        "silver harbor thriller and music, the score is wonderful, lovely, superb.",
        "silver harbor thriller music wonderful. " * 4,
        GOOD + " " + GOOD,
        GOOD + " " + " ".join(f"w{index}" for index in range(40)) + ".",
    ],
)
def test_degenerate_texts_score_well_below_an_honest_review(degenerate):
    assert gold_utility(FACTS, degenerate) <= gold_utility(FACTS, GOOD) - 2.0


def test_word_groups_share_no_word():
    groups = [*GENRE_WORDS.values(), *ASPECT_WORDS.values(), WARM_WORDS, COLD_WORDS, FUNCTION_WORDS]
    assert not [set(a) & set(b) for a, b in combinations(groups, 2) if set(a) & set(b)]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"film": "silver harbor", "genre": "thriller"}, "expected the texts 'film', 'genre' and 'aspect'"),
        (FACTS | {"film": 3}, "expected the texts"),
        ({}, "facts {}: expected the texts"),
        (FACTS | {"genre": "thrillre"}, "the fact genre 'thrillre' is not one of: thriller, comedy"),
        (FACTS | {"aspect": "sound"}, "the fact aspect 'sound' is not one of: acting, music"),
    ],
)
def test_facts_of_another_task_are_refused(facts, message):
    with pytest.raises(StageError) as caught:
        gold_utility(facts, GOOD)
    assert message in str(caught.value)


def test_preference_probability():
    assert preference_probability(math.log(3), 0.0, 1.0) == pytest.approx(0.75)  # odds of 3 to 1
    assert preference_probability(0.0, math.log(3), 1.0) == pytest.approx(0.25)
    assert preference_probability(1.0 + 2 * math.log(9), 1.0, 2.0) == pytest.approx(0.9)
    assert preference_probability(1e6, 0.0, 1.0) == 1.0
    assert preference_probability(0.0, 1e6, 1.0) == 0.0


def test_bayes_accuracy():
    pairs = [(math.log(3), 0.0), (0.0, math.log(9)), (1.0, 1.0)]
    assert bayes_accuracy(pairs, 1.0) == pytest.approx((0.75 + 0.9 + 0.5) / 3)
    assert bayes_accuracy(iter([(4.0, 4.0 + 2 * math.log(3))]), 2.0) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="no pairs"):
        bayes_accuracy([], 1.0)
