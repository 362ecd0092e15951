from collections import Counter

import pytest
from stages.lib.data.prompt_splits import held_out_prompts, prompt_digests

from stages.lib.command.errors import StageError


def digests(texts, seed=1):
    return [prompt_digests([{"role": "user", "content": text}], seed)[-1] for text in texts]


def alone(texts, seed=1):
    """Prompts of one message each, as `held_out_prompts` takes them."""
    return dict.fromkeys(digests(texts, seed), b"")


def held_out_part(beginnings, fraction):
    """The prompts of one split held out."""
    return set(held_out_prompts(beginnings, {"test": fraction}))


def conversations(*talks, seed=1):
    """Prompts given as 'a b c': user, assistant, user."""
    found = {}
    for talk in talks:
        *shorter, digest = prompt_digests(turns(talk), seed)
        found[digest] = b"".join(shorter)
    return found


def turns(talk):
    return [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(talk.split())]


def test_prompts_that_differ_in_case_and_white_space_only_are_one():
    assert len(set(digests(["Make tea.", " make\n\ntea. ", "MAKE TEA."]))) == 1
    assert len(set(digests(["make tea.", "make tea", "maketea."]))) == 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ﬁlm", "film"),
        ("Ｆｉｌｍ", "film"),
        ("caf\u00e9", "cafe\u0301"),
        ("STRASSE", "straße"),
        ("a\u00a0b\u2003c", "A b c"),
        ("℡", "tel"),
        ("ẛ̣", "ṩ"),
        ("ΌΣ", "ός"),
    ],
)
def test_prompts_that_unicode_holds_for_equal_are_one(one, other):
    assert len(set(digests([one, other]))) == 1


def test_a_beginning_has_the_digest_of_the_prompt_that_it_is():
    whole = prompt_digests([{"role": "system", "content": "s"}, *turns("a b c d e")], 1)
    assert len(whole) == 3
    for count, digest in zip((2, 4), whole, strict=False):
        assert prompt_digests([{"role": "system", "content": "S "}, *turns("a b c d e")][:count], 1)[-1] == digest
    assert not set(whole) & set(prompt_digests(turns("a b c d e"), 1))


@pytest.mark.parametrize("seed", range(20))
def test_conversations_that_go_on_from_one_another_stand_on_one_side(seed):
    talks = [f"{n} x {n}{tail}" for n in range(10) for tail in ("", "a", "a y z", "b", "b y z")]
    talks += [str(n) for n in range(10)]
    of_talk = dict(zip(talks, conversations(*talks, seed=seed), strict=True))
    held_out = held_out_part(conversations(*talks, seed=seed), 0.3)
    sides = {n: {of_talk[talk] in held_out for talk in talks if talk.split()[0] == str(n)} for n in range(10)}
    assert all(len(side) == 1 for side in sides.values())
    assert len(held_out) == 18  # three tenths of 60 prompts, in whole groups of 6


def test_conversations_that_only_begin_alike_are_apart():
    """What they share is no prompt of the data: nothing of one is the beginning of the other."""
    held_out = held_out_part(conversations("hello hi tea", "hello hi milk"), 0.5)
    assert len(held_out) == 1


def test_a_group_keeps_its_place_when_others_come():
    few = conversations(*(f"{n} x {n}" for n in range(100)))
    more = conversations(*(f"{n} x {n}" for n in range(110)))
    assert len(held_out_part(few, 0.2) & held_out_part(more, 0.2)) >= 17
    apart = conversations(*map(str, range(100)))
    assert held_out_part(apart, 0.2) == set(sorted(apart)[:20])


def test_a_group_larger_than_the_part_to_hold_out_stays_in_train():
    talk = " ".join(map(str, range(21)))
    parts = [" ".join(talk.split()[: 2 * n + 1]) for n in range(11)]
    big, small = conversations(*parts), conversations("a", "b c d")
    for seed in range(5):
        held_out = held_out_part(conversations(*parts, "a", "b c d", seed=seed), 0.15)
        assert held_out == set(conversations("a", "b c d", seed=seed))
    assert len(big) == 11
    assert held_out_part(big | conversations("a", "a c d"), 0.05) == set(conversations("a", "a c d"))
    assert len(small) == 2


def test_roles_and_the_borders_of_messages_matter():
    one = [{"role": "user", "content": "a b"}]
    two = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    asked = [{"role": "system", "content": "a b"}]
    assert len({b"".join(prompt_digests(prompt, 1)) for prompt in (one, two, asked)}) == 3
    assert [len(prompt_digests(prompt, 1)) for prompt in (one, two, asked)] == [1, 2, 0]


@pytest.mark.parametrize(("count", "fraction", "expected"), [(100, 0.1, 10), (7, 0.01, 1), (2, 0.9, 1), (10, 0.99, 9)])
def test_the_held_out_part_has_the_size_asked_for_and_leaves_one_on_each_side(count, fraction, expected):
    assert len(held_out_part(alone(map(str, range(count))), fraction)) == expected


def test_the_draw_depends_on_the_seed_and_not_on_the_order():
    texts = [str(number) for number in range(200)]
    drawn = {}
    for seed in (1, 2):
        of_text = dict(zip(digests(texts, seed), texts, strict=True))
        drawn[seed] = {of_text[digest] for digest in held_out_part(alone(texts, seed), 0.5)}
    assert 30 < len(drawn[1] & drawn[2]) < 70  # half of 100 in common if independent, standard deviation 3.5
    assert held_out_part(alone(texts), 0.5) == held_out_part(alone(reversed(texts)), 0.5)


def test_one_prompt_cannot_be_split():
    with pytest.raises(StageError, match="1 distinct prompt of 1 conversations cannot be divided among train and test"):
        held_out_part(alone(["a", "A"]), 0.5)
    with pytest.raises(StageError, match="2 distinct prompts of 1 conversations cannot"):
        held_out_part(conversations("a", "a b c"), 0.5)


def test_two_splits_are_held_out_side_by_side_in_whole_groups():
    talks = [f"{n}{tail}" for n in range(100) for tail in ("", f" x {n}")]
    found = held_out_prompts(conversations(*talks), {"test": 0.2, "validation": 0.1})
    assert Counter(found.values()) == {"test": 40, "validation": 20}
    place = dict(zip(talks, conversations(*talks), strict=True))
    assert all(found.get(place[str(n)]) == found.get(place[f"{n} x {n}"]) for n in range(100))
    alone_test = held_out_prompts(conversations(*talks), {"test": 0.2})
    assert set(alone_test) == {digest for digest, split in found.items() if split == "test"}


def test_each_of_three_sides_gets_a_prompt():
    for seed in range(5):
        found = held_out_prompts(alone("abc", seed), {"test": 0.9, "validation": 0.05})
        assert sorted(found.values()) == ["test", "validation"]
    with pytest.raises(
        StageError, match="2 distinct prompts of 2 conversations cannot be divided among train and test"
    ):
        held_out_prompts(alone("ab"), {"test": 0.1, "validation": 0.1})
    assert held_out_prompts(alone("ab"), {"test": 0.0, "validation": 0.0}) == {}
