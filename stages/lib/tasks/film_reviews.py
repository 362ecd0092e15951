"""The synthetic film-review assistant task: prompts, reviews of mixed quality, and sampled preference labels.

A user asks for a short review of a made-up film of a genre, touching one aspect. Reviews vary in how well they stay on
topic, in warmth, repetition and length; most are mediocre. Of two independent reviews of one prompt the preferred one
is drawn from Bradley-Terry on the gold utility (`stages.lib.tasks.film_gold`), so the best possible accuracy is known.

Each (film, aspect) belongs to one split by a hash of it and the seed, so no prompt is in two, whatever the kinds and
row counts. Each kind and split draws from its own generator: more rows of one leave the others' bytes alone.
"""

import hashlib
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from stages.lib.data.conversations import Message, assistant, user
from stages.lib.data.prepared_rows import PreparedRow, Split, preference_pair
from stages.lib.data.prompts import Prompt
from stages.lib.settings.task_sources import FilmReviewSettings
from stages.lib.tasks.film_gold import (
    ASPECT_WORDS,
    COLD_ADJECTIVES,
    GENRE_WORDS,
    WARM_ADJECTIVES,
    bayes_accuracy,
    gold_utility,
    label_accuracy,
    preference_probability,
    split_words,
)
from stages.lib.tasks.task import TASK

# Of the (film, aspect) pairs; train has the rest.
TEST_SHARE = 0.05
VALIDATION_SHARE = 0.05
TITLE_FIRST_WORDS = split_words(
    """silver golden broken silent hidden crimson distant frozen midnight paper glass iron velvet lonely burning
    sleeping wandering painted forgotten northern southern eastern second final hollowed little ancient electric"""
)
TITLE_SECOND_WORDS = split_words(
    """harbor river garden letter winter lantern mirror castle station bridge forest island summer train window tower
    orchard sparrow compass valley street shadow carnival lighthouse kingdom violin meadow journey"""
)
PLAIN_ADJECTIVES = split_words("ordinary passable average modest plain simple common regular typical standard")
ADJECTIVES = {"warm": WARM_ADJECTIVES, "plain": PLAIN_ADJECTIVES, "cold": COLD_ADJECTIVES}

SYSTEM_MESSAGES = (
    "you are a helpful film critic.",
    "you write short reviews of films.",
    "you are a friendly assistant who knows many films.",
    "answer in a few short sentences.",
)
REQUESTS = (
    "please write a short review of the {genre} film {film}. what about the {aspect}?",
    "what do you think of the {aspect} in {film}, the {genre} film?",
    "tell me about the {genre} film {film}, and say something about the {aspect}.",
    "can you review {film}? it is a {genre} film and i care about the {aspect}.",
    "i may watch {film}, a {genre} film. how is the {aspect}?",
    "give me a few words on the {aspect} of the {genre} film {film}.",
)
FIRST_TURNS = (
    ("do you know the film {film}?", "yes, it is a {genre} film."),
    ("i want to watch a {genre} film tonight.", "you could watch {film}."),
    ("which {genre} film is new this week?", "there is one called {film}."),
)
SECOND_TURNS = (
    "please write a short review of it. what about the {aspect}?",
    "what do you think of the {aspect} in it?",
    "tell me more, and say something about the {aspect}.",
    "i care about the {aspect}. can you review it?",
)
OPENINGS = (
    "{film} is {a_adjective} {genre} film.",
    "{film} tells {a_adjective} tale of {genre_noun}.",
    "i found {film} to be {a_adjective} {genre} film.",
)
VAGUE_OPENINGS = (
    "{subject} is {a_adjective} film.",
    "{subject} seems {adjective} to me.",
)
ASPECT_SENTENCES = (
    "the {noun} is {adjective} and the {other_noun} feels {other_adjective}.",
    "the {noun} seems {adjective} from start to end.",
    "i noticed the {noun}, which was {adjective} and {other_adjective}.",
)
IDLE_SENTENCES = (
    "the popcorn was salty that night.",
    "my seat stood near the door.",
    "it rained on the way home.",
    "a friend called me about dinner.",
    "the bus came late again.",
    "someone lost an umbrella there.",
)
CLOSINGS = {
    "warm": ("i would gladly see it again.", "i enjoyed every minute.", "i will happily tell my friends."),
    "plain": ("it lasts about two hours.", "i saw it last week.", "people can watch it at home."),
    "cold": ("i regret that evening.", "you should avoid it.", "i disliked nearly every minute."),
}


class PreferenceDraw(NamedTuple):
    """A labelled pair with the gold utilities that its label was drawn from."""

    prompt: list[Message]
    facts: dict[str, str]
    chosen: str
    rejected: str
    chosen_utility: float
    rejected_utility: float


def rows(settings: FilmReviewSettings, seed: int) -> Iterator[PreparedRow]:
    """All kinds that have a size, in all splits; equal arguments give equal rows."""
    kinds = settings.kinds
    sizes: dict[Split, tuple[int, int, int]] = {
        "train": (settings.sft_rows, settings.preference_rows, settings.prompt_rows),
        "validation": (settings.validation_rows,) * 3,
        "test": (settings.test_rows,) * 3,
    }
    for split, (sft, preference, prompts) in sizes.items():
        for values in draw_sft(split, sft, seed) if "sft" in kinds else ():
            yield PreparedRow("sft", split, values)
        if "preference" in kinds:
            for pair in draw_preferences(split, preference, seed, settings.label_temperature):
                row = preference_pair(pair.prompt, pair.chosen, pair.rejected)
                yield PreparedRow("preference", split, row | {"facts": {TASK: "film_reviews", **pair.facts}})
        for values in draw_prompts(split, prompts, seed) if "prompts" in kinds else ():
            yield PreparedRow("prompts", split, values)


def known(settings: FilmReviewSettings, seed: int) -> dict[str, float]:
    """The best accuracy that can be expected on the test pairs, if there are any, and that on the labels drawn."""
    if "preference" not in settings.kinds:
        return {}
    pairs = draw_preferences("test", settings.test_rows, seed, settings.label_temperature)
    utilities = [(pair.chosen_utility, pair.rejected_utility) for pair in pairs]
    return {
        "bayes_accuracy": bayes_accuracy(utilities, settings.label_temperature),
        "gold_label_accuracy": label_accuracy(utilities),
    }


def grade(prompt: Prompt, response: str) -> float:
    """The gold utility of a review. Raises StageError if the prompt's facts lack film, genre or aspect."""
    return gold_utility(prompt.facts, response)


def draw_sft(split: Split, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Conversations that end in one review of mixed quality."""
    rng = random.Random(f"{seed}-sft-{split}")
    for prompt, facts in distinct_prompts(rng, split, count, seed):
        yield {"messages": [*prompt, assistant(write_review(rng, facts))]}


def draw_preferences(split: Split, count: int, seed: int, temperature: float) -> Iterator[PreferenceDraw]:
    """Pairs of independent reviews of one prompt, labelled by Bradley-Terry on their gold utilities."""
    rng = random.Random(f"{seed}-preference-{split}")
    for prompt, facts in distinct_prompts(rng, split, count, seed):
        yield draw_preference(rng, prompt, facts, temperature)


def draw_preference(
    rng: random.Random, prompt: list[Message], facts: dict[str, str], temperature: float
) -> PreferenceDraw:
    first = second = write_review(rng, facts)
    while second == first:
        second = write_review(rng, facts)
    utilities = gold_utility(facts, first), gold_utility(facts, second)
    if rng.random() >= preference_probability(*utilities, temperature):
        first, second, utilities = second, first, utilities[::-1]
    return PreferenceDraw(prompt, facts, first, second, *utilities)


def draw_prompts(split: Split, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Prompts with the facts that the gold utility needs."""
    rng = random.Random(f"{seed}-prompts-{split}")
    for prompt, facts in distinct_prompts(rng, split, count, seed):
        yield {"prompt": prompt, "facts": {TASK: "film_reviews", **facts}}


def distinct_prompts(
    rng: random.Random, split: str, count: int, seed: int
) -> Iterator[tuple[list[Message], dict[str, str]]]:
    """Yield `count` prompts of the split, no two alike, with their facts."""
    seen: set[str] = set()
    while len(seen) < count:
        facts = {
            "film": f"{rng.choice(TITLE_FIRST_WORDS)} {rng.choice(TITLE_SECOND_WORDS)}",
            "genre": rng.choice(tuple(GENRE_WORDS)),
            "aspect": rng.choice(tuple(ASPECT_WORDS)),
        }
        if split_of(facts, seed) != split:
            continue
        prompt = write_prompt(rng, facts)
        if repr(prompt) not in seen:
            seen.add(repr(prompt))
            yield prompt, facts


def split_of(facts: dict[str, str], seed: int) -> Split:
    """The split that all prompts about this film and aspect belong to."""
    digest = hashlib.sha256(f"{seed}-{facts['film']}-{facts['aspect']}".encode()).digest()
    place = int.from_bytes(digest[:4], "big") / 2**32
    if place < TEST_SHARE:
        return "test"
    return "validation" if place < TEST_SHARE + VALIDATION_SHARE else "train"


def write_prompt(rng: random.Random, facts: dict[str, str]) -> list[Message]:
    """A request in one of several phrasings: one in four after a system message, one in four on a second turn."""
    system = [{"role": "system", "content": rng.choice(SYSTEM_MESSAGES)}] if rng.random() < 0.25 else []
    if rng.random() >= 0.25:
        return [*system, user(rng.choice(REQUESTS).format(**facts))]
    question, answer = rng.choice(FIRST_TURNS)
    turns = [user(question.format(**facts)), assistant(answer.format(**facts))]
    return [*system, *turns, user(rng.choice(SECOND_TURNS).format(**facts))]


def write_review(rng: random.Random, facts: dict[str, str]) -> str:
    """A review of one to six short sentences whose quality is drawn anew: mostly mediocre, rarely very good."""
    quality = rng.random()
    tone = pick(rng, {"warm": 0.15 + 0.4 * quality, "plain": 0.35, "cold": 0.5 - 0.4 * quality})
    opening = write_opening(rng, facts, quality, tone)
    body = write_body(rng, facts, quality, tone)
    shape = pick(rng, {"full": 0.2 + 0.4 * quality, "brief": 0.45 - 0.25 * quality, "rambling": 0.35 - 0.15 * quality})
    sentences = [rng.choice((opening, body))] if shape == "brief" else [opening, body, rng.choice(CLOSINGS[tone])]
    if shape == "rambling":
        sentences[2:2] = rng.sample(IDLE_SENTENCES, 2)
    if rng.random() < 0.45 - 0.35 * quality:
        sentences.append(rng.choice(sentences))
    return " ".join(sentences)


def write_opening(rng: random.Random, facts: dict[str, str], quality: float, tone: str) -> str:
    adjective = rng.choice(ADJECTIVES[tone])
    if rng.random() >= 0.4 + 0.4 * quality:
        subject = rng.choice(("it", "this"))
        return rng.choice(VAGUE_OPENINGS).format(subject=subject, adjective=adjective, a_adjective=article(adjective))
    genre = facts["genre"] if rng.random() < 0.6 + 0.3 * quality else rng.choice(tuple(GENRE_WORDS))
    noun = rng.choice(GENRE_WORDS[genre][1:])
    return rng.choice(OPENINGS).format(film=facts["film"], a_adjective=article(adjective), genre=genre, genre_noun=noun)


def write_body(rng: random.Random, facts: dict[str, str], quality: float, tone: str) -> str:
    """A sentence on the aspect asked for, on another one, or on nothing of the film."""
    topic = pick(rng, {"asked": 0.4 + 0.4 * quality, "other": 0.4 - 0.25 * quality, "idle": 0.2 - 0.15 * quality})
    if topic == "idle":
        return rng.choice(IDLE_SENTENCES)
    others = [name for name in ASPECT_WORDS if name != facts["aspect"]]
    nouns = rng.sample(ASPECT_WORDS[facts["aspect"] if topic == "asked" else rng.choice(others)], 2)
    adjectives = rng.sample(ADJECTIVES[tone], 2)
    return rng.choice(ASPECT_SENTENCES).format(
        noun=nouns[0], other_noun=nouns[1], adjective=adjectives[0], other_adjective=adjectives[1]
    )


def pick(rng: random.Random, weights: dict[str, float]) -> str:
    """One of the names, with probability in proportion to its weight."""
    return rng.choices(tuple(weights), tuple(weights.values()))[0]


def article(adjective: str) -> str:
    return f"an {adjective}" if adjective[0] in "aeiou" else f"a {adjective}"
