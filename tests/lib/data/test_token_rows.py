"""Rows as ids, worked out by hand: what is trained, what a template is given, and what is cut off where."""

from collections import Counter

import pytest
from tokenizers import processors

from stages.lib.command.errors import StageError
from stages.lib.data.chat import RefusedRowError
from stages.lib.data.row_errors import MalformedRowError, UnusableRowError
from stages.lib.data.token_rows import ENCODINGS, OverBudgetError, encode_rows, first_tokens, within_budget
from stages.lib.settings.declaration import block
from stages.lib.settings.tokenize_data import Tokenize
from tests.lib.data.test_chat import (
    ASSISTANT,
    CHAT_TEMPLATE,
    EOS,
    HO,
    ID_H,
    ID_I,
    ID_O,
    MARKED,
    SPACE,
    SPACE_H,
    USER,
    assistant,
    tiny,
    user,
)

TALK = [user("h"), assistant("ho"), user("i"), assistant("o")]
TALK_IDS = [USER, ID_H, ASSISTANT, HO, EOS, USER, ID_I, ASSISTANT, ID_O, EOS]
WITHOUT_EOS = MARKED.replace("<eos>", "")
BLOCKS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<a>{% generation %}{{ m['content'] }}<eos>"
    "{% endgeneration %}{% else %}<u>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
# As templates of reasoning models do: what comes before the last "i" of a reply stands only in the last one.
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<a>"
    "{{ m['content'] if loop.last else m['content'].split('i')[-1] }}<eos>{% else %}<u>{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
TOOLS = (
    "{% if tools %}{% for t in tools %}{{ t.function.name }}{% endfor %}{% endif %}{% for m in messages %}"
    "{{ {'user': '<u>', 'assistant': '<a>', 'tool': '<u>'}[m.role] ~ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{{ opening }}{% endif %}"
)


def settings(**changes):
    return Tokenize(**block(Tokenize, max_length=40, max_prompt_length=20, **changes))


def encoded(kind, row, template=MARKED, **changes):
    """The row's ids, before budgets. Raises why it cannot be encoded."""
    read = ENCODINGS[kind].read({"source": "films", **row}, "here")
    (result,) = encode_rows(tiny(template), kind, [read], settings(**changes))
    if isinstance(result, Exception):
        raise result
    return result, read


def columns(kind, row, template=MARKED, **changes):
    result, read = encoded(kind, row, template, **changes)
    return ENCODINGS[kind].columns(within_budget(result, settings(**changes)), read)


def trained(row, template=MARKED, **changes):
    """The ids of a row of kind sft, and those of them that are trained."""
    table = columns("sft", row, template, **changes)
    ids = table["input_ids"]
    return ids, [token for token, learnt in zip(ids, table["loss_mask"], strict=True) if learnt]


# What is trained.


def test_all_replies_and_their_ends_or_the_last_alone():
    assert trained({"messages": TALK}) == (TALK_IDS, [HO, EOS, ID_O, EOS])
    assert trained({"messages": TALK}, loss_on="last_reply") == (TALK_IDS, [ID_O, EOS])


def test_an_earlier_reply_has_an_end_only_if_the_template_writes_one():
    ids = [USER, ID_H, ASSISTANT, HO, USER, ID_I, ASSISTANT, ID_O, EOS]
    assert trained({"messages": TALK}, WITHOUT_EOS) == (ids, [HO, ID_O, EOS])


@pytest.mark.parametrize("template", [MARKED, BLOCKS])
def test_turns_by_weight_whatever_the_loss_is_on(template):
    first, second = {**TALK[1], "weight": 1}, {**TALK[3], "weight": 0}
    row = {"messages": [TALK[0], first, TALK[2], second]}
    for loss_on in ("all_replies", "last_reply"):
        # What comes after the last trained turn has nothing to teach.
        assert trained(row, template, loss_on=loss_on) == (TALK_IDS[:5], [HO, EOS])
    row = {"messages": [TALK[0], {**TALK[1], "weight": 0}, TALK[2], TALK[3]]}
    assert trained(row, template) == (TALK_IDS, [ID_O, EOS])  # the other has the weight 1 of OpenAI's format
    row = {"messages": [TALK[0], second]}
    with pytest.raises(UnusableRowError, match=r"^nothing_trained$"):
        trained(row, template)


def test_a_first_turn_of_the_assistant_answers_nothing():
    row = {"messages": [assistant("h"), *TALK]}
    assert trained(row) == ([ASSISTANT, ID_H, EOS, *TALK_IDS], [HO, EOS, ID_O, EOS])
    assert trained(row, BLOCKS) == ([ASSISTANT, ID_H, EOS, *TALK_IDS], [HO, EOS, ID_O, EOS])


def test_blocks_of_the_template_say_what_is_trained():
    assert trained({"messages": TALK}, BLOCKS) == (TALK_IDS, [HO, EOS, ID_O, EOS])
    assert trained({"messages": TALK}, BLOCKS, loss_on="last_reply") == (TALK_IDS, [ID_O, EOS])
    opening = BLOCKS.replace("<a>{% generation %}", "{% generation %}<a>")
    assert trained({"messages": TALK}, opening) == (TALK_IDS, [ASSISTANT, HO, EOS, ASSISTANT, ID_O, EOS])
    outside = BLOCKS.replace("<eos>{% endgeneration %}", "{% endgeneration %}<eos>")
    assert trained({"messages": TALK}, outside) == (TALK_IDS, [HO, EOS, ID_O, EOS])


def test_blocks_that_are_not_one_for_each_turn_are_refused():
    two = BLOCKS.replace("{{ m['content'] }}<eos>", "{{ m['content'] }}{% endgeneration %}{% generation %}<eos>")
    with pytest.raises(RefusedRowError, match="around 4 parts of a conversation with 2 messages of the assistant"):
        trained({"messages": TALK}, two)


def test_a_template_that_forgets_earlier_reasoning_is_refused_unless_the_last_reply_is_trained_alone():
    row = {"messages": [user("h"), assistant("iho"), user("h"), assistant("io")]}
    with pytest.raises(
        RefusedRowError, match=r"message 2 otherwise once .*'iho' becomes 'ho<eos>.*loss_on: last_reply"
    ):
        trained(row, FORGETFUL)
    ids = [USER, ID_H, ASSISTANT, HO, EOS, USER, ID_H, ASSISTANT, ID_I, ID_O, EOS]
    assert trained(row, FORGETFUL, loss_on="last_reply") == (ids, [ID_I, ID_O, EOS])
    assert trained({"messages": row["messages"][:2]}, FORGETFUL)[1] == [ID_I, HO, EOS]


def test_no_token_spans_an_earlier_reply_and_what_stands_around_it():
    """Encoded as one text, the space that opens a reply would join its h, and the loss miss its first letter."""
    template = MARKED.replace("'<a>'}", "'<a> '}").replace("<a>{% endif %}", "<a> {% endif %}")
    row = {"messages": [user("i"), assistant("hi"), user("i"), assistant("h")]}
    opened = [USER, ID_I, ASSISTANT, SPACE]
    assert trained(row, template) == ([*opened, ID_H, ID_I, EOS, *opened, ID_H, EOS], [ID_H, ID_I, EOS, ID_H, EOS])
    assert SPACE_H not in trained(row, template)[0]


def test_a_whole_text_is_trained_from_its_second_token_on():
    assert trained({"text": "hi hi"}) == ([ID_H, ID_I, SPACE_H, ID_I, EOS], [ID_I, SPACE_H, ID_I, EOS])
    with pytest.raises(UnusableRowError, match=r"^special_token_in_text$"):
        trained({"text": "h<eos>"})
    with pytest.raises(StageError, match="here: 'text' must be text, and not empty"):
        trained({"text": " "})


# Other kinds.


def test_a_rated_reply():
    row = {"prompt": TALK[:3], "completion": [assistant("ho")], "label": False}
    expected = {"prompt_ids": TALK_IDS[:8], "completion_ids": [HO, EOS], "label": False, "mismatched_ids": None}
    assert columns("unpaired", row) == expected | {"score": None}
    assert columns("unpaired", row | {"score": -2.5}) == expected | {"score": -2.5}
    for score in ("much", True, 1e39):
        with pytest.raises(MalformedRowError, match="here, 'score': "):
            columns("unpaired", row | {"score": score})
    for label in (None, 1, "true"):
        with pytest.raises(StageError, match="here: 'label' must be true or false, found"):
            columns("unpaired", row | {"label": label})


def test_a_prompt_of_plain_text_has_neither_template_nor_end():
    table = columns("prompts", {"text": "hi hi", "facts": {"a": 1}})
    assert table["prompt_ids"] == [ID_H, ID_I, SPACE_H, ID_I]
    assert (table["messages"], table["facts"], table["context"]) == ("[]", '{"a": 1}', '{"text": "hi hi"}')


def test_the_first_tokens_of_a_text_are_drawn_evenly_and_by_row():
    drawn = [len(first_tokens([*range(9)], (2, 7), 17, "imdb", row)) for row in range(6000)]
    counts = Counter(drawn)
    assert sorted(counts) == [2, 3, 4, 5, 6, 7]
    assert max(abs(count - 1000) for count in counts.values()) < 5 * (6000 * 5 / 36) ** 0.5  # five standard deviations
    assert first_tokens([*range(9)], (2, 7), 17, "imdb", 5) == [*range(drawn[5])]
    for seed, source in ((18, "imdb"), (17, "books")):
        assert [len(first_tokens([*range(9)], (2, 7), seed, source, row)) for row in range(50)] != drawn[:50]
    assert first_tokens([4], (2, 7), 17, "imdb", 0) == [4]


def with_bos():
    """Its <u> comes before plain text, as Llama's BOS does."""
    tokenizer = tiny()
    tokenizer.bos_token = "<u>"
    single = processors.TemplateProcessing(single="<u> $A", special_tokens=[("<u>", USER)])
    tokenizer.backend_tokenizer.post_processor = single
    return tokenizer


@pytest.mark.parametrize("cut", ["keep_end", "keep_start"])
def test_plain_text_begins_with_bos_where_its_tokenizer_puts_one_and_no_cut_takes_it(cut):
    limits = settings()
    text, raw, talk = (
        ENCODINGS[kind].read({"source": "films", **row}, "here")
        for kind, row in (("sft", {"text": "hi"}), ("prompts", {"text": "hio"}), ("prompts", {"prompt": [user("i")]}))
    )
    (whole,) = encode_rows(with_bos(), "sft", [text], limits)
    table = ENCODINGS["sft"].columns(whole, text)
    assert (table["input_ids"], table["loss_mask"]) == ([USER, ID_H, ID_I, EOS], [False, True, True, True])
    prompt, rendered = encode_rows(with_bos(), "prompts", [raw, talk], limits)
    assert prompt.prompt == [USER, ID_H, ID_I, ID_O]
    assert rendered.prompt == [USER, ID_I, ASSISTANT]  # with what the chat template writes, and nothing before it
    short = Tokenize(**(block(Tokenize) | {"max_length": 9, "max_prompt_length": 3, "truncation": cut}))
    kept = {"keep_end": [ID_I, ID_O], "keep_start": [ID_H, ID_I]}[cut]
    assert within_budget(prompt, short).prompt == [USER, *kept]
    assert first_tokens(prompt.prompt, (2, 2), 17, "films", 0, prompt.bos) == [USER, ID_H, ID_I]


# Tools, arguments and reasoning.

CALL = {"type": "function", "function": {"name": "oi", "arguments": {}}}
TOOL = {"type": "function", "function": {"name": "oi", "parameters": {}}}


def test_tools_and_arguments_reach_the_template():
    calls = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    row = {"messages": [user("h"), calls, {"role": "tool", "content": "o"}, assistant("i")]}
    row |= {"tools": [TOOL], "template_arguments": {"opening": ""}}
    ids = [ID_O, ID_I, USER, ID_H, ASSISTANT, ID_O, ID_I, EOS, USER, ID_O, ASSISTANT, ID_I, EOS]
    assert trained(row, TOOLS) == (ids, [ID_O, ID_I, EOS, ID_I, EOS])
    prompt = columns("prompts", {"prompt": [user("h")], "tools": [TOOL], "template_arguments": {"opening": "h"}}, TOOLS)
    assert prompt["prompt_ids"] == [ID_O, ID_I, USER, ID_H, ASSISTANT, ID_H]
    assert '"tools": [{"function": {"name": "oi"' in prompt["context"]
    assert '"template_arguments": {"opening": "h"}' in prompt["context"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": TALK[:2], "tools": [TOOL]}, "leaves out the tools: 'oi' is not in its text"),
        ({"messages": [user("oi"), assistant("i")], "tools": [TOOL]}, "leaves out the tools: its text is the same"),
        (
            {"messages": [user("h"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]},
            "leaves out the calls of tools: 'oi' is not in its text",
        ),
        (
            {"messages": [user("h"), assistant("i"), {"role": "tool", "content": "o"}, assistant("i")]},
            "refuses these messages: unknown role 'tool': expected system, user or assistant",
        ),
    ],
)
def test_a_template_that_knows_no_tools_refuses_them(row, message):
    with pytest.raises(RefusedRowError, match=message):
        trained(row, CHAT_TEMPLATE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tools": {}}, "here, 'tools': expected a list of objects"),
        ({"tools": [1]}, "here, 'tools': expected a list of objects"),
        ({"template_arguments": [1]}, "here, 'template_arguments': expected an object, found list"),
        ({"template_arguments": {"messages": []}}, "here, 'template_arguments': 'messages' cannot be given so"),
        ({"source": None}, "here: 'source', the name of the row's source, is missing"),
    ],
)
def test_what_a_template_cannot_be_given(values, message):
    with pytest.raises(StageError, match=message):
        trained({"messages": TALK, **values})


def test_a_special_token_in_a_call_or_a_tool_makes_a_row_unusable():
    forged = {"type": "function", "function": {"name": "oi", "arguments": {"a": "<eos>"}}}
    with pytest.raises(UnusableRowError, match=r"^special_token_in_text$"):
        trained({"messages": [user("h"), {"role": "assistant", "content": "", "tool_calls": [forged]}]}, TOOLS)
    described = {"type": "function", "function": {"name": "oi", "description": "<u>"}}
    with pytest.raises(UnusableRowError, match=r"^special_token_in_text$"):
        trained({"messages": TALK, "tools": [described]}, TOOLS)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_where_the_template_takes_it_and_told_where_not(field):
    row = {"messages": [user("h"), {**assistant("o"), field: "hi"}]}
    takes = MARKED.replace("~ m['content']", "~ (m.reasoning_content or '') ~ m['content']")
    result, _ = encoded("sft", row, takes)
    assert (result.replies[0].ids, result.reasoning_left_out) == ([ID_H, ID_I, ID_O, EOS], False)
    result, _ = encoded("sft", row)
    assert (result.replies[0].ids, result.reasoning_left_out) == ([ID_O, EOS], True)


# Budgets.

PAIR = {"prompt": [user("hihi")], "chosen": [assistant("ii")], "rejected": [assistant("i")]}  # 6 + 3 and 2 tokens
PAIR_IDS = [USER, ID_H, ID_I, ID_H, ID_I, ASSISTANT]


def fitted(row=PAIR, kind="preference", **changes):
    result, read = encoded(kind, row)
    values = block(Tokenize) | {"max_length": 9, "max_prompt_length": 6} | changes
    cut = within_budget(result, Tokenize(**values))
    return cut, ENCODINGS[kind].columns(cut, read)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_prompt_length": 5}, "prompt_too_long"),
        ({"max_length": 8}, "too_long"),
        ({"max_completion_length": 2}, "reply_too_long"),
        ({"truncation": "keep_end", "max_completion_length": 2}, "reply_too_long"),
        ({"truncation": "keep_start", "max_length": 3, "max_prompt_length": 2}, "too_long"),
    ],
)
def test_what_does_not_fit_and_may_not_be_cut(changes, reason):
    with pytest.raises(OverBudgetError) as refused:
        fitted(**changes)
    assert refused.value.args[0] == reason


def test_what_just_fits_is_whole():
    for truncation in ("error", "drop", "keep_end", "keep_start"):
        row, table = fitted(truncation=truncation)
        assert (row.prompt_is_cut, row.reply_is_cut) == (False, False)
        assert table["prompt_ids"] == PAIR_IDS
        assert (table["chosen_ids"], table["rejected_ids"]) == ([ID_I, ID_I, EOS], [ID_I, EOS])


@pytest.mark.parametrize(
    ("changes", "prompt"),
    [
        ({"truncation": "keep_end", "max_prompt_length": 4}, PAIR_IDS[-4:]),
        ({"truncation": "keep_start", "max_prompt_length": 4}, PAIR_IDS[:4]),
        ({"truncation": "keep_end", "max_length": 7}, PAIR_IDS[-4:]),
        ({"truncation": "keep_start", "max_length": 7}, PAIR_IDS[:4]),
    ],
)
def test_a_prompt_is_cut_and_no_reply(changes, prompt):
    row, table = fitted(**changes)
    assert (row.prompt_is_cut, row.reply_is_cut) == (True, False)
    assert table["prompt_ids"] == prompt
    assert (table["chosen_ids"], table["rejected_ids"]) == ([ID_I, ID_I, EOS], [ID_I, EOS])


def test_replies_are_cut_where_that_is_asked_for_and_get_no_end():
    row, table = fitted(truncation="keep_end", cut_replies=True, max_length=8)
    assert (row.prompt_is_cut, row.reply_is_cut) == (False, True)
    assert (table["chosen_ids"], table["rejected_ids"]) == ([ID_I, ID_I], [ID_I, EOS])
    with pytest.raises(UnusableRowError, match=r"^equal_replies$"):  # by the cut
        fitted(truncation="keep_end", cut_replies=True, max_completion_length=1)


def test_a_conversation_is_cut_before_its_first_reply_or_after_a_trained_token():
    row, table = fitted({"messages": TALK}, "sft", truncation="keep_end")
    assert table["input_ids"] == TALK_IDS[1:]
    assert row.prompt_is_cut
    for limit, kept in ((9, 9), (8, 5), (7, 5), (6, 5), (5, 5), (4, 4)):  # at 6 to 8 the end would be the user's words
        changes = {"max_length": limit, "max_prompt_length": 3, "truncation": "keep_start", "cut_replies": True}
        row, table = fitted({"messages": TALK}, "sft", **changes)
        assert table["input_ids"] == TALK_IDS[:kept]
        assert row.reply_is_cut
        assert table["loss_mask"] == [place in (3, 4, 8, 9) for place in range(kept)]
