import pytest

from stages.lib.data.prompt_digests import content_digest, digests_of_row, prompt_digests


def digests(texts, seed=1):
    return [prompt_digests([{"role": "user", "content": text}], seed)[-1] for text in texts]


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


def test_roles_and_the_borders_of_messages_matter():
    one = [{"role": "user", "content": "a b"}]
    two = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    asked = [{"role": "system", "content": "a b"}]
    assert len({b"".join(prompt_digests(prompt, 1)) for prompt in (one, two, asked)}) == 3
    assert [len(prompt_digests(prompt, 1)) for prompt in (one, two, asked)] == [1, 2, 1]


def test_a_prompt_that_ends_with_a_tool_s_answer_is_another_than_its_beginning():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    other = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "g", "arguments": {}}}]}
    answer = {"role": "tool", "content": "7"}
    one, two = (prompt_digests([*turns("a"), made, answer], 1) for made in (call, other))
    assert len(one) == len(two) == 2
    assert one[0] == two[0] == prompt_digests(turns("a"), 1)[0]
    assert one[1] != two[1]


def test_another_seed_gives_other_digests():
    assert digests(["a"], 1) != digests(["a"], 2)


def test_rows_of_every_kind_have_the_prompt_that_their_reply_follows():
    prompt, reply = turns("a b c"), {"role": "assistant", "content": "d"}
    rows = [
        {"messages": [*prompt, reply]},
        {"prompt": prompt, "chosen": [reply], "rejected": [reply]},
        {"prompt": prompt, "completion": [reply], "label": True},
        {"prompt": prompt},
    ]
    assert {tuple(digests_of_row(row, 1)) for row in rows} == {tuple(prompt_digests(prompt, 1))}
    assert digests_of_row({"text": "A b"}, 1) == digests_of_row({"text": "a  b"}, 1)
    assert digests_of_row({"text": "a"}, 1) != digests_of_row({"prompt": turns("a")}, 1)


def test_content_is_what_a_row_trains_on():
    def content(kind, **values):
        return content_digest(values, kind, b"p")

    row = {"prompt": turns("a"), "completion": turns("b"), "label": True}
    assert content("unpaired", **row) == content("unpaired", **row, facts={"x": 1}, source="s")
    assert content("unpaired", **row) != content("unpaired", **row | {"label": False})
    assert content("unpaired", **row) != content("unpaired", **row, tools=[{"name": "f"}])
    pair = {"prompt": turns("a"), "chosen": turns("b"), "rejected": turns("c")}
    assert content("preference", **pair) == content("preference", **pair, margin=2.0)
    assert content("preference", **pair) != content("preference", **pair | {"chosen": turns("B")})


def test_prompts_are_known_as_prompts_are():
    rows = [{"prompt": turns("a")}, {"prompt": turns("A")}]
    contents = [content_digest(row, "prompts", digests_of_row(row, 1)[-1]) for row in rows]
    assert contents[0] == contents[1]
    with_tools = rows[0] | {"tools": [{"name": "f"}]}
    assert content_digest(with_tools, "prompts", digests_of_row(with_tools, 1)[-1]) != contents[0]
