"""Messages written as text: JSON and Python's lists are read, anything else that is meant as messages is refused."""

import json

import pytest

from stages.lib.data.conversations import MalformedRowError
from stages.lib.data.detection import detect_format
from stages.lib.data.message_cells import with_messages_read
from tests.lib.data.reading import one_example, said
from tests.lib.data.test_formats import PAIRS, REPLIES, bot, user


@pytest.mark.parametrize("write", [json.dumps, str])
@pytest.mark.parametrize("name", PAIRS | REPLIES)
def test_a_row_of_every_format_is_read_alike_with_its_lists_as_text(name, write):
    row = (PAIRS | REPLIES)[name]
    texts = {key: value if isinstance(value, str) else write(value) for key, value in row.items()}
    assert with_messages_read(texts, "here") == row
    assert detect_format(with_messages_read(texts, "here"), "here") == name
    assert with_messages_read(row, "here") == row


def test_replies_of_messages_beside_a_prompt_of_text():
    row = {"prompt": "tea", "chosen": json.dumps([user("tea"), bot("yes")]), "rejected": json.dumps([bot("no")])}
    example = one_example(with_messages_read(row, "here"), "preference")
    assert said(example) == ([user("tea")], "yes", "no")


@pytest.mark.parametrize("write", [json.dumps, str])
@pytest.mark.parametrize(
    ("column", "name", "beside"),
    [
        ("prompt", "prompt", {}),
        ("prompt", "prompt", {"gold": "7"}),
        ("prompt", "prompt_completion", {"completion": "yes"}),
        ("prompt", "preference", {"chosen": "yes", "rejected": "no"}),
        ("instruction", "alpaca", {"output": "yes"}),
        ("question", "question_answer", {"answer": "yes"}),
    ],
)
def test_a_prompt_of_messages_alone_or_beside_texts(column, name, beside, write):
    prompt = [user("hello"), bot("hi"), user("tea")]
    example = one_example(with_messages_read({column: write(prompt), **beside}, "here"), name)
    replies = [beside.get(side) for side in ("completion", "output", "answer", "chosen") if side in beside]
    assert said(example) == (prompt, *(replies or [None]), beside.get("rejected"))


MESSAGES = json.dumps([{"id": 1} | bot("yes")])
NUMPY = "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]"  # without commas


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": MESSAGES, "rejected": "b"}, "here, 'chosen': messages written as text beside"),
        (
            {"prompt": MESSAGES, "chosen": "a", "rejected": MESSAGES},
            "here, 'rejected': messages written as text beside",
        ),
        ({"prompt": "[{'role': 'user', 'content': 'a'"}, "here, 'prompt': not valid JSON"),
        ({"prompt": "a", "completion": MESSAGES}, "here, 'completion': messages written as text beside"),
        ({"instruction": "a", "output": MESSAGES}, "here, 'output': messages written as text beside"),
        ({"prompt": "a", "chosen": NUMPY, "rejected": NUMPY}, "here, 'chosen': not valid JSON"),
        ({"prompt": "a", "chosen": MESSAGES[:-2], "rejected": MESSAGES}, "here, 'chosen': not valid JSON"),
        ({"messages": NUMPY}, "here, 'messages': not valid JSON"),
        ({"messages": "hello"}, "here, 'messages': not valid JSON"),
        (
            {"messages": '[{"role": "user", "role": "user"}]'},
            "here, 'messages': not usable JSON (the key 'role' stands",
        ),
        ({"messages": "[" * 100_000}, "here, 'messages': not usable JSON (brackets"),
        ({"instruction": "a", "output": "b", "history": "x"}, "here, 'history': not valid JSON"),
    ],
)
def test_what_is_meant_as_messages_and_cannot_be_read_is_refused(row, message):
    with pytest.raises(MalformedRowError) as caught:
        with_messages_read(row, "here")
    assert message in str(caught.value)
    assert caught.value.reason == "messages_as_text"


@pytest.mark.parametrize("text", ["[null]", '["a"]', "[]"])
def test_a_prompt_that_is_a_list_stands_for_messages_beside_replies_that_do(text):
    row = {"prompt": text, "chosen": MESSAGES, "rejected": MESSAGES}
    assert with_messages_read(row, "here")["prompt"] == json.loads(text)
    for prompt in ("[1", "[see above] why?", "a"):
        assert with_messages_read(row | {"prompt": prompt}, "here")["prompt"] == prompt


@pytest.mark.parametrize(
    "text",
    ['[{"value": 1}, {"value": 2}]', '{"role": "user", "content": "a"}', "[{role: x, content: y}]", "[" * 100_000],
)
def test_a_reply_of_other_json_stays_a_text(text):
    for row in ({"prompt": "a", "completion": text}, {"prompt": "a", "chosen": text, "rejected": "b"}):
        assert with_messages_read(row, "here") == row


def test_an_empty_cell_is_no_messages():
    assert with_messages_read({"messages": " ", "history": ""}, "here") == {"messages": [], "history": []}
