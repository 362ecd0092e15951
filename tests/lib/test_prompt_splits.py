import pytest

from stages.lib.errors import StageError
from stages.lib.prompt_splits import eval_prompts, prompt_digest


def digests(texts, seed=1):
    return [prompt_digest([{"role": "user", "content": text}], seed) for text in texts]


def test_prompts_that_differ_in_case_and_white_space_only_are_one():
    assert len(set(digests(["Make tea.", " make\n\ntea. ", "MAKE TEA."]))) == 1
    assert len(set(digests(["make tea.", "make tea", "maketea."]))) == 3


def test_roles_and_the_borders_of_messages_matter():
    one = [{"role": "user", "content": "a b"}]
    two = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    asked = [{"role": "system", "content": "a b"}]
    assert len({prompt_digest(prompt, 1) for prompt in (one, two, asked)}) == 3


@pytest.mark.parametrize(("count", "fraction", "expected"), [(100, 0.1, 10), (7, 0.01, 1), (2, 0.9, 1), (10, 0.99, 9)])
def test_the_held_out_part_has_the_size_asked_for_and_leaves_one_on_each_side(count, fraction, expected):
    assert len(eval_prompts(digests(map(str, range(count))), fraction)) == expected


def test_the_draw_depends_on_the_seed_and_not_on_the_order():
    texts = [str(number) for number in range(200)]
    drawn = {}
    for seed in (1, 2):
        of_text = dict(zip(digests(texts, seed), texts, strict=True))
        drawn[seed] = {of_text[digest] for digest in eval_prompts(of_text, 0.5)}
    assert 30 < len(drawn[1] & drawn[2]) < 70  # half of 100 in common if independent, standard deviation 3.5
    assert eval_prompts(digests(texts), 0.5) == eval_prompts(reversed(digests(texts)), 0.5)


def test_one_prompt_cannot_be_split():
    with pytest.raises(StageError, match="1 distinct prompt is left"):
        eval_prompts(digests(["a", "A"]), 0.5)
