import pytest

from stages.lib.command.errors import StageError
from stages.lib.data.prompt_splits import eval_prompts, prompt_digests


def digests(texts, seed=1):
    return [prompt_digests([{"role": "user", "content": text}], seed)[-1] for text in texts]


def alone(texts, seed=1):
    """Prompts of one message each, as `eval_prompts` takes them."""
    return dict.fromkeys(digests(texts, seed), b"")


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
    held_out = eval_prompts(conversations(*talks, seed=seed), 0.3)
    sides = {n: {of_talk[talk] in held_out for talk in talks if talk.split()[0] == str(n)} for n in range(10)}
    assert all(len(side) == 1 for side in sides.values())
    assert len(held_out) == 18  # three tenths of 60 prompts, in whole groups of 6


def test_conversations_that_only_begin_alike_are_apart():
    """What they share is no prompt of the data: nothing of one is the beginning of the other."""
    held_out = eval_prompts(conversations("hello hi tea", "hello hi milk"), 0.5)
    assert len(held_out) == 1


def test_a_group_keeps_its_place_when_others_come():
    few = conversations(*(f"{n} x {n}" for n in range(100)))
    more = conversations(*(f"{n} x {n}" for n in range(110)))
    assert len(eval_prompts(few, 0.2) & eval_prompts(more, 0.2)) >= 17
    apart = conversations(*map(str, range(100)))
    assert eval_prompts(apart, 0.2) == set(sorted(apart)[:20])


def test_a_group_larger_than_the_part_to_hold_out_stays_in_train():
    talk = " ".join(map(str, range(21)))
    parts = [" ".join(talk.split()[: 2 * n + 1]) for n in range(11)]
    big, small = conversations(*parts), conversations("a", "b c d")
    for seed in range(5):
        held_out = eval_prompts(conversations(*parts, "a", "b c d", seed=seed), 0.15)
        assert held_out == set(conversations("a", "b c d", seed=seed))
    assert len(big) == 11
    assert eval_prompts(big | conversations("a", "a c d"), 0.05) == set(conversations("a", "a c d"))
    assert len(small) == 2


def test_roles_and_the_borders_of_messages_matter():
    one = [{"role": "user", "content": "a b"}]
    two = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    asked = [{"role": "system", "content": "a b"}]
    assert len({b"".join(prompt_digests(prompt, 1)) for prompt in (one, two, asked)}) == 3
    assert [len(prompt_digests(prompt, 1)) for prompt in (one, two, asked)] == [1, 2, 0]


@pytest.mark.parametrize(("count", "fraction", "expected"), [(100, 0.1, 10), (7, 0.01, 1), (2, 0.9, 1), (10, 0.99, 9)])
def test_the_held_out_part_has_the_size_asked_for_and_leaves_one_on_each_side(count, fraction, expected):
    assert len(eval_prompts(alone(map(str, range(count))), fraction)) == expected


def test_the_draw_depends_on_the_seed_and_not_on_the_order():
    texts = [str(number) for number in range(200)]
    drawn = {}
    for seed in (1, 2):
        of_text = dict(zip(digests(texts, seed), texts, strict=True))
        drawn[seed] = {of_text[digest] for digest in eval_prompts(alone(texts, seed), 0.5)}
    assert 30 < len(drawn[1] & drawn[2]) < 70  # half of 100 in common if independent, standard deviation 3.5
    assert eval_prompts(alone(texts), 0.5) == eval_prompts(alone(reversed(texts)), 0.5)


def test_one_prompt_cannot_be_split():
    with pytest.raises(StageError, match="1 distinct prompt is left"):
        eval_prompts(alone(["a", "A"]), 0.5)
    with pytest.raises(StageError, match="2 prompts of one conversation are left"):
        eval_prompts(conversations("a", "a b c"), 0.5)
