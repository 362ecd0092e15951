"""Calls and descriptions of tools, and what else messages say beside role and content."""

import json
from collections import Counter

import pytest

from stages.lib.command.errors import StageError
from stages.lib.data.conversations import MalformedRowError, UnusableRowError, messages_from
from stages.lib.data.message_cells import without_keys
from stages.lib.data.tool_calls import object_from, tools_from
from tests.lib.data.reading import one_example
from tests.lib.data.test_formats import bot, system, user

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, {"y": None}]}}}
ARGUMENTS = CALL["function"]["arguments"]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": ARGUMENTS}}]},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": json.dumps(ARGUMENTS)}], "function_call": None},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": json.dumps(ARGUMENTS)}},
        {"from": "function_call", "value": json.dumps({"name": "f", "arguments": ARGUMENTS})},
        {"from": "function_call", "value": json.dumps([{"name": "f", "arguments": ARGUMENTS}])},
        {"from": "gpt", "value": "", "tool_calls": json.dumps([CALL])},
    ],
)
def test_calls_of_every_shape_are_read_alike_with_arguments_as_objects(message):
    assert messages_from([message], "here") == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]


def test_several_calls_keep_their_ids_and_order():
    given = [{"id": "1", "type": "function", "function": {"name": "f"}}, {"name": "g", "arguments": ""}]
    (message,) = messages_from([{"role": "assistant", "content": "Wait.", "tool_calls": given}], "here")
    assert message["content"] == "Wait."
    assert message["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {}}, "id": "1"},
        {"type": "function", "function": {"name": "g", "arguments": {}}},
    ]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "assistant", "tool_calls": [{"arguments": {}}]}, "'tool_calls', call 1: expected a function with"),
        ({"role": "assistant", "tool_calls": [CALL, 5]}, "'tool_calls', call 2: expected a function with a 'name'"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x"}]}, "call 1, 'arguments': not valid JSON"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]},
            "expected an object, or one as JSON",
        ),
        ({"from": "function_call", "value": "f(x)"}, "here, message 1, 'value': not valid JSON"),
        ({"from": "function_call", "value": "[]"}, "expected a call, found an empty list"),
        ({"from": "function_call", "value": None}, "'value', call 1: expected a function"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "the key 'tool_calls' belongs to the assistant"),
        ({"role": "user", "content": "a", "weight": 1}, "the key 'weight' belongs to the assistant, not to user"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "'weight': expected 0 or 1, found 0.5"),
        ({"role": "assistant", "content": "a", "weight": True}, "'weight': expected 0 or 1, found True"),
        ({"role": "assistant", "content": "a", "name": 5}, "'name': expected text, found int"),
        ({"role": "tool", "content": "a", "tool_call_id": ["x"]}, "'tool_call_id': expected text, found list"),
        ({"role": "user", "content": [{"type": "image_url", "text": "a"}]}, "part 1: expected text, or a part of type"),
        ({"role": "user", "content": ["a"]}, "part 1: expected text, or a part of type 'text', found str"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "part 1: expected text"),
    ],
)
def test_what_a_message_cannot_say_is_told(message, told):
    with pytest.raises(MalformedRowError) as caught:
        messages_from([message], "here")
    assert told in str(caught.value)
    assert "here, message 1" in str(caught.value)


def test_keys_that_say_something_are_kept_and_nulls_are_not():
    given = {
        "role": "assistant",
        "content": "a",
        "reasoning_content": "why",
        "thinking": None,
        "weight": 0.0,
        "name": "",
    }
    assert messages_from([given], "here") == [bot("a") | {"reasoning_content": "why", "weight": 0}]
    tool = {"role": "function", "name": "f", "content": "", "tool_call_id": "1", "tool_calls": None}
    assert messages_from([tool], "here") == [{"role": "tool", "content": "", "name": "f", "tool_call_id": "1"}]
    asked = {"from": "human", "value": "a", "weight": 0, "tool_calls": []}
    assert messages_from([asked], "here") == [user("a")]


def test_tools_are_read_from_lists_and_texts():
    bare, wrapped = {"name": "f", "parameters": {}}, {"type": "function", "function": {"name": "f", "parameters": {}}}
    for value in ([bare], [wrapped], json.dumps([bare]), str([wrapped])):
        assert tools_from(value, "here") == [wrapped]
    for nothing in (None, "", " ", [], "[]"):
        assert tools_from(nothing, "here") is None
    for wrong, told in [
        (bare, "here: expected a list of tools, found dict"),
        ("f", "here: not valid JSON"),
        ([bare, "f"], "here, tool 2: expected a function with a 'name'"),
        ([{"function": {}}], "here, tool 1: expected a function"),
    ]:
        with pytest.raises(MalformedRowError) as caught:
            tools_from(wrong, "here")
        assert told in str(caught.value)


def test_arguments_of_the_template_are_an_object_or_its_text():
    for value in ({"a": 1}, '{"a": 1}', "{'a': 1}"):
        assert object_from(value, "here") == {"a": 1}
    for nothing in (None, "", {}, "{}"):
        assert object_from(nothing, "here") is None
    with pytest.raises(MalformedRowError, match="here: expected an object, found list"):
        object_from("[1]", "here")


def test_functions_are_tools_by_their_older_name_and_not_beside_tools():
    row = {"messages": [user("a"), bot("b")], "functions": [{"name": "f"}]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert one_example(row, "messages").tools == tools
    with pytest.raises(StageError, match="'tools' and 'functions' both describe tools"):
        one_example(row | {"tools": tools}, "messages")


TOOL = {"role": "tool", "content": ""}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user("a"), CALLING], None),
        ([user("a"), CALLING, TOOL, TOOL, bot("b")], None),
        ([system("s"), user("a"), CALLING, TOOL, CALLING, TOOL, bot("b"), user("c"), bot("d")], None),
        ([user("a"), TOOL, bot("b")], "not_alternating"),
        ([TOOL, bot("b")], "not_alternating"),
        ([user("a"), bot("x"), bot("y"), user("b"), bot("c")], "not_alternating"),
        ([user("a"), CALLING, bot("b")], "not_alternating"),
        ([user("a"), CALLING, TOOL, user("c"), bot("b")], "not_alternating"),
        ([user("a"), system("s"), bot("b")], "not_alternating"),
        ([user("a"), CALLING, TOOL], "ends_with_tool"),
        ([user("a"), bot("")], "empty_reply"),
        ([user("a"), bot(" "), user("b"), bot("c")], "empty_message"),
        ([user("a\ud83d"), bot("b")], "invalid_unicode"),
        ([user("a"), CALLING | {"tool_calls": [CALL | {"id": "\ud83d"}]}], "invalid_unicode"),
        ([system("s"), bot("b")], "empty_prompt"),
    ],
)
def test_conversations_with_tools_keep_to_the_order_of_templates(messages, reason):
    row = {"messages": messages}
    if reason is None:
        example = one_example(row, "messages")
        assert [*example.prompt, example.reply] == messages
        return
    with pytest.raises(UnusableRowError, match=f"^{reason}$"):
        one_example(row, "messages")


def test_replies_that_differ_in_their_calls_alone_are_a_pair():
    other = CALLING | {"tool_calls": [CALL | {"function": {"name": "g", "arguments": {}}}]}
    row = {"prompt": [user("a")], "chosen": [CALLING], "rejected": [other]}
    example = one_example(row, "preference")
    assert (example.reply, example.rejected) == (CALLING, other)
    with pytest.raises(UnusableRowError, match=r"^equal_replies$"):
        one_example(row | {"rejected": [CALLING]}, "preference")


@pytest.mark.parametrize(
    ("turns", "kept", "counts"),
    [
        (["gpt:x", "human:a", "gpt:b"], [user("a"), bot("b")], {"cut/first_assistant_turn": 1}),
        (["human:a", "gpt:b", "human:x"], [user("a"), bot("b")], {"cut/last_user_turn": 1}),
        (
            ["system:s", "gpt:x", "human:a", "gpt:b"],
            [system("s"), user("a"), bot("b")],
            {"cut/first_assistant_turn": 1},
        ),
        (["gpt:x", "human:y"], "empty_reply", {"cut/first_assistant_turn": 1, "cut/last_user_turn": 1}),
        (["gpt:x"], "empty_prompt", {}),
        (["human:x"], "empty_reply", {"cut/last_user_turn": 1}),
        ([], "empty_reply", {}),
        (["gpt:x", "gpt:y", "human:a", "gpt:b"], "not_alternating", {"cut/first_assistant_turn": 1}),
        (["human:a", "gpt:b", "human:x", "human:y"], "ends_with_user", {"cut/last_user_turn": 1}),
    ],
)
def test_sharegpt_turns_that_nothing_can_train_are_cut_and_counted(turns, kept, counts):
    found = Counter()
    pieces = [turn.partition(":") for turn in turns]
    row = {"conversations": [{"from": role, "value": text} for role, _, text in pieces]}
    if isinstance(kept, str):
        with pytest.raises(UnusableRowError, match=f"^{kept}$"):
            one_example(row, "sharegpt", counts=found)
    else:
        example = one_example(row, "sharegpt", counts=found)
        assert [*example.prompt, example.reply] == kept
    assert found == counts


def test_keys_of_messages_are_left_out_by_name():
    message = bot("a") | {"weight": 0, "name": "n"}
    row = {
        "messages": [user("q"), message],
        "chosen": message,
        "input": {"messages": [message], "weight": 5},
        "completion": "weight",
        "tools": [{"name": "n", "weight": 1}],
    }
    kept = bot("a") | {"name": "n"}
    assert without_keys(row, ["weight", "content"]) == row | {
        "messages": [user("q"), kept],
        "chosen": kept,
        "input": {"messages": [kept], "weight": 5},
    }
    assert without_keys(row, []) is row


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_template_arguments_cannot_take_the_place_of_the_row(name):
    row = {"messages": [user("a"), bot("b")], "chat_template_kwargs": {name: []}}
    with pytest.raises(MalformedRowError, match=f"here, 'chat_template_kwargs': '{name}' cannot be given so"):
        one_example(row, "messages")
    assert one_example(row | {"chat_template_kwargs": {"own": 1}}, "messages").template_arguments == {"own": 1}
