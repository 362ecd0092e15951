"""The generated task: what its rows hold, that labels follow the stated law, that splits and kinds stay apart."""

import json
import math
import os
import random
import statistics
import subprocess
import sys
from functools import cache
from itertools import combinations, pairwise

import pytest

from stages.lib.command.errors import StageError
from stages.lib.command.params import build
from stages.lib.data.prompts import Prompt
from stages.lib.settings.declaration import block
from stages.lib.tasks import film_gold
from stages.lib.tasks.film_reviews import (
    TITLE_FIRST_WORDS,
    TITLE_SECOND_WORDS,
    FilmReviewSettings,
    distinct_prompts,
    draw_preferences,
    grade,
    known,
    rows,
    write_review,
)

SIZES = {"sft_rows": 300, "preference_rows": 300, "prompt_rows": 300, "validation_rows": 80, "test_rows": 120}
SETTINGS = FilmReviewSettings(**block(FilmReviewSettings, **SIZES, label_temperature=1.0))
SPLITS = ("train", "validation", "test")
SIGNS = {"chosen": 1, "rejected": -1}
KINDS = ("sft", "preference", "prompts")


def rows_by_file(settings, seed):
    """kind → split → what the rows hold."""
    found = {kind: {split: [] for split in SPLITS} for kind in KINDS}
    for row in rows(settings, seed):
        found[row.kind][row.split].append(row.values)
    return found


@cache
def generated():
    return rows_by_file(SETTINGS, 17)


def prompt_of(row):
    return row["prompt"] if "prompt" in row else row["messages"][:-1]


def text_of(messages):
    return " ".join(message["content"] for message in messages)


def facts_of(prompt):
    """Film, genre and aspect as a reader finds them in the prompt's words."""
    words = "".join(letter if letter.isalpha() else " " for letter in text_of(prompt)).split()
    (film,) = {f"{a} {b}" for a, b in pairwise(words) if a in TITLE_FIRST_WORDS and b in TITLE_SECOND_WORDS}
    (genre,) = set(words) & set(film_gold.GENRE_WORDS)
    (aspect,) = set(words) & set(film_gold.ASPECT_WORDS)
    return {"film": film, "genre": genre, "aspect": aspect}


def test_row_counts():
    counts = {kind: {split: len(rows) for split, rows in splits.items()} for kind, splits in generated().items()}
    assert counts == {kind: {"train": 300, "validation": 80, "test": 120} for kind in KINDS}


def test_rows_have_the_prepared_form():
    for kind, keys in {"sft": {"messages"}, "preference": {"prompt", "chosen", "rejected", "facts"}}.items():
        assert all(set(row) == keys for split in generated()[kind].values() for row in split)
    for row in generated()["prompts"]["test"]:
        assert set(row) == {"prompt", "facts"}
        assert row["facts"] == {"task": "film_reviews", **facts_of(row["prompt"])}
    for row in generated()["preference"]["train"]:
        assert [message["role"] for message in row["chosen"] + row["rejected"]] == ["assistant"] * 2
        assert row["chosen"] != row["rejected"]
    assert all(row["messages"][-1]["role"] == "assistant" for row in generated()["sft"]["train"])


def test_prompts_vary_in_form():
    roles = [tuple(message["role"] for message in prompt_of(row)) for row in generated()["prompts"]["train"]]
    shares = {form: roles.count(form) / len(roles) for form in set(roles)}
    second_turn = ("user", "assistant", "user")
    expected = {
        ("user",): 9 / 16,
        ("system", "user"): 3 / 16,
        second_turn: 3 / 16,
        ("system", *second_turn): 1 / 16,
    }
    assert shares == pytest.approx(expected, abs=4 * math.sqrt(0.25 / len(roles)))
    assert max(len(text_of(prompt_of(row)).split()) for row in generated()["prompts"]["train"]) <= 60


def test_no_prompt_is_in_two_splits():
    texts, topics = {}, {}
    for split in SPLITS:
        prompts = [prompt_of(row) for kind in KINDS for row in generated()[kind][split]]
        texts[split] = {json.dumps(prompt) for prompt in prompts}
        topics[split] = {(facts_of(prompt)["film"], facts_of(prompt)["aspect"]) for prompt in prompts}
    for one, other in combinations(SPLITS, 2):
        assert not texts[one] & texts[other]
        assert not topics[one] & topics[other]


def test_prompts_of_a_file_are_distinct():
    for kind in KINDS:
        for found in generated()[kind].values():
            assert len({json.dumps(prompt_of(row)) for row in found}) == len(found)


def test_reviews_are_short_and_end():
    rng = random.Random(1)
    reviews = [write_review(rng, facts) for _, facts in distinct_prompts(rng, "train", 2000, 17)]
    lengths = [len(review.split()) for review in reviews]
    assert all(review.endswith(".") for review in reviews)
    assert min(lengths) >= 4
    assert max(lengths) <= 60
    assert 12 <= statistics.mean(lengths) <= 28


def test_there_is_much_to_gain_over_the_average_review():
    rng = random.Random(2)
    utilities = [
        film_gold.gold_utility(facts, write_review(rng, facts)) for _, facts in distinct_prompts(rng, "train", 2000, 17)
    ]
    best = 5.0
    label_noise = math.pi / math.sqrt(3)  # standard deviation of the logistic distribution of scale 1
    assert max(utilities) == best
    assert best - statistics.mean(utilities) >= 2.5 * label_noise
    assert statistics.quantiles(utilities, n=20)[-1] >= statistics.mean(utilities) + 1.5 * label_noise


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_labels_agree_with_the_gold_as_often_as_bayes_accuracy_says(temperature):
    pairs = [*draw_preferences("train", 6000, 5, temperature)]
    agreement = statistics.mean(
        1.0
        if pair.chosen_utility > pair.rejected_utility
        else 0.5
        if pair.chosen_utility == pair.rejected_utility
        else 0
        for pair in pairs
    )
    gaps = [abs(pair.chosen_utility - pair.rejected_utility) for pair in pairs]
    expected = statistics.mean(1 / (1 + math.exp(-gap / temperature)) for gap in gaps)
    assert agreement == pytest.approx(expected, abs=4 * math.sqrt(0.25 / len(pairs)))
    if temperature == 1.0:
        assert 0.83 <= expected <= 0.87


def test_near_ties_are_decided_by_chance():
    """Labels are drawn, not sorted: among near ties the worse review is often chosen."""
    pairs = draw_preferences("train", 6000, 6, 1.0)
    near = [pair.chosen_utility - pair.rejected_utility for pair in pairs]
    near = [gap for gap in near if 0 < abs(gap) <= 0.5]
    share = statistics.mean(gap > 0 for gap in near)
    # gaps of 0.25 and 0.5: sigmoid is 0.562 and 0.622
    assert 0.562 - 4 * math.sqrt(0.25 / len(near)) <= share <= 0.622 + 4 * math.sqrt(0.25 / len(near))


def test_bayes_accuracy_is_that_of_the_test_pairs():
    chances, agreements = [], []
    for row in generated()["preference"]["test"]:
        assert row["facts"] == {"task": "film_reviews", **facts_of(row["prompt"])}
        gap = math.fsum(sign * film_gold.gold_utility(row["facts"], text_of(row[side])) for side, sign in SIGNS.items())
        chances.append(1 / (1 + math.exp(-abs(gap))))
        agreements.append(0.5 if gap == 0 else float(gap > 0))
    expected = {"bayes_accuracy": statistics.mean(chances), "gold_label_accuracy": statistics.mean(agreements)}
    assert known(SETTINGS, 17) == pytest.approx(expected)
    assert expected["bayes_accuracy"] != expected["gold_label_accuracy"]


def test_the_grade_of_a_response_is_its_gold_utility():
    row = generated()["prompts"]["test"][0]
    prompt = Prompt(0, [1], row["prompt"], row["facts"])
    review = f"{row['facts']['film']} is a lovely {row['facts']['genre']} film. i enjoyed every minute."
    # title, genre, two warm words, 11 words or 1 short: 0.5 + 0.5 + 2.5 - 0.25
    assert grade(prompt, review) == pytest.approx(3.25)
    assert grade(prompt, "") == -3.5


@pytest.mark.parametrize(
    ("setting", "changed"), [("sft_rows", "sft"), ("preference_rows", "preference"), ("prompt_rows", "prompts")]
)
def test_more_rows_of_one_kind_change_no_other_file(setting, changed):
    before, after = generated(), rows_by_file(SETTINGS.model_copy(update={setting: 350}), 17)
    for kind in KINDS:
        assert after[kind]["validation"] == before[kind]["validation"]
        assert after[kind]["test"] == before[kind]["test"]
        assert after[kind]["train"][:300] == before[kind]["train"]
        assert len(after[kind]["train"]) == (350 if kind == changed else 300)


def test_seeds_kinds_and_splits_draw_from_generators_of_their_own():
    """Draws from one stream would share most prompts; independent draws of 300 among 125 000 share hardly any."""
    other = rows_by_file(SETTINGS, 18)
    files = [found[kind][split] for found in (generated(), other) for kind in KINDS for split in SPLITS]
    prompts = [{json.dumps(prompt_of(row)) for row in file} for file in files]
    assert max(len(a & b) for a, b in combinations(prompts, 2)) <= 5


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_a_fresh_process_gives_the_same_rows_without_heavy_imports(hash_seed):
    code = (
        "import json, sys\n"
        "from stages.lib.settings.declaration import block\n"
        "from stages.lib.tasks.film_reviews import FilmReviewSettings, rows\n"
        "assert not {'numpy', 'pandas', 'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        f"settings = FilmReviewSettings(**block(FilmReviewSettings, **{SIZES}, label_temperature=1.0))\n"
        "print(json.dumps([*rows(settings, 17)]))\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(process.stdout) == [list(row) for row in rows(SETTINGS, 17)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sft_rows": 100_001}, "sft_rows must be at least 0 and at most 100000, found 100001"),
        ({"preference_rows": -1}, "preference_rows must be .*, found -1"),
        ({"prompt_rows": 10**9}, "prompt_rows must be .*, found 1000000000"),
        ({"test_rows": 0}, "test_rows must be .*, found 0"),
        ({"label_temperature": 0.0}, "label_temperature must be at least 0.001, found 0.0"),
        ({"label_temperature": math.nan}, "label_temperature: expected a finite number, found nan"),
    ],
)
def test_contradictory_settings_are_refused(change, message):
    with pytest.raises(StageError, match=message):
        build(FilmReviewSettings, dict(SETTINGS) | change, "film_reviews")


def test_a_kind_of_no_size_is_in_no_split():
    settings = SETTINGS.model_copy(update={"sft_rows": 0, "preference_rows": 0})
    assert settings.kinds == ("prompts",)
    assert {row.kind for row in rows(settings, 17)} == {"prompts"}
    assert known(settings, 17) == {}
    kept = [row for row in rows(SETTINGS, 17) if row.kind == "prompts"]
    assert list(rows(settings, 17)) == kept
