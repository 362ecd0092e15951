import json
import struct
from typing import get_args

import pytest

from stages.lib.command.errors import StageError
from stages.lib.data.conversations import MalformedRowError, UnusableRowError
from stages.lib.data.detection import FormatOfRows, detect_format
from stages.lib.data.formats import READERS, WITHOUT_PAIRS, Format, columns_read, picked_facts
from tests.lib.data.reading import one_example, options, said
from tests.real_files import real_file


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def hh(*turns):
    return "".join(f"\n\n{role}: {text}" for role, text in zip(["Human", "Assistant"] * 9, turns, strict=False))


# One row of each format that says the same: after "hello" and "hi", "tea" is asked for; the reply is "yes", not "no".
PROMPT = [user("hello"), bot("hi"), user("tea")]
SHAREGPT = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}, {"from": "human", "value": "tea"}]
PAIRS = {
    "hh": {"chosen": hh("hello", "hi", "tea", "yes"), "rejected": hh("hello", "hi", "tea", "no")},
    "preference": {"prompt": PROMPT, "chosen": [bot("yes")], "rejected": [bot("no")]},
    "preference_implicit": {"chosen": [*PROMPT, bot("yes")], "rejected": [*PROMPT, bot("no")]},
    "alpaca_preference": {"instruction": "tea", "chosen": "yes", "rejected": "no", "history": [["hello", "hi"]]},
    "question_preference": {"question": "tea", "chosen": "yes", "rejected": "no", "history": [["hello", "hi"]]},
    "messages_preference": {"messages": PROMPT, "chosen": bot("yes"), "rejected": "no"},
    "openai_preference": {
        "input": {"messages": PROMPT, "tools": [], "parallel_tool_calls": True},
        "preferred_output": [bot("yes")],
        "non_preferred_output": [bot("no")],
    },
    "sharegpt_preference": {
        "conversations": SHAREGPT,
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
}
REPLIES = {
    "alpaca": {"instruction": "tea", "output": "yes", "history": [["hello", "hi"]]},
    "messages": {"messages": [*PROMPT, bot("yes")]},
    "prompt_completion": {"prompt": PROMPT, "completion": [bot("yes")]},
    "sharegpt": {"conversations": [*SHAREGPT, {"from": "gpt", "value": "yes"}]},
    "question_answer": {"question": "tea", "answer": "yes", "history": [["hello", "hi"]]},
}


def test_the_formats_that_can_be_named_are_those_that_can_be_read():
    assert set(READERS) == set(get_args(Format)) == PAIRS.keys() | REPLIES.keys() | {"prompt", "text", "comparison"}
    assert set(WITHOUT_PAIRS) == REPLIES.keys() | {"prompt", "text"}


@pytest.mark.parametrize("name", PAIRS | REPLIES)
def test_every_format_is_detected_and_read_alike(name):
    row = (PAIRS | REPLIES)[name]
    assert detect_format(row, "here") == name
    example = one_example(row, name)
    assert said(example) == (PROMPT, "yes", "no" if name in PAIRS else None)
    assert (example.margin, example.label, example.text, example.facts, example.tools) == (None, None, None, {}, None)


@pytest.mark.parametrize("name", PAIRS)
def test_margin_is_kept_beside_every_kind_of_pair(name):
    assert one_example(PAIRS[name] | {"margin": 2}, name, "here").margin == 2.0
    assert one_example(PAIRS[name] | {"margin": "0.5"}, name, "here").margin == 0.5
    assert one_example(PAIRS[name] | {"margin": ""}, name, "here").margin is None


@pytest.mark.parametrize(
    "wrong", [True, "much", float("nan"), float("inf"), [1], -1, "-0.1", 3.5e38, 1e39, "1e39", int("9" * 401)]
)
def test_a_margin_is_a_finite_number_of_at_least_0_that_float32_holds(wrong):
    with pytest.raises(MalformedRowError, match=r"here, 'margin': expected a finite number of at least 0") as caught:
        one_example(PAIRS["preference"] | {"margin": wrong}, "preference", "here")
    assert caught.value.reason == "bad_margin"


def test_the_largest_margin_is_that_of_float32():
    margin = one_example(PAIRS["hh"] | {"margin": 3.4028234663852886e38}, "hh", "here").margin
    assert margin == struct.unpack("<f", struct.pack("<f", margin))[0]


@pytest.mark.parametrize("name", PAIRS | REPLIES)
def test_the_system_column_is_the_first_message_in_every_format(name):
    row = (PAIRS | REPLIES)[name] | {"system": "Be brief."}
    assert detect_format(row, "here") == name
    assert one_example(row, name, "here").prompt == [system("Be brief."), *PROMPT]
    assert one_example(row | {"system": " "}, name, "here").prompt == PROMPT
    with pytest.raises(MalformedRowError, match=r"here, 'system': expected text, found int"):
        one_example(row | {"system": 5}, name, "here")


def test_a_system_message_said_twice_is_one_and_two_are_refused():
    row = {"messages": [system("Be brief."), user("tea"), bot("yes")], "system": "Be brief."}
    assert one_example(row, "messages", "here").prompt == [system("Be brief."), user("tea")]
    with pytest.raises(MalformedRowError, match="the column 'system' says something else") as caught:
        one_example(row | {"system": "Be kind."}, "messages", "here")
    assert caught.value.reason == "two_system_messages"


TEXTS = {
    "preference": {"prompt": "tea", "chosen": "yes", "rejected": "no"},
    "preference_implicit": {"chosen": "tea yes", "rejected": "tea no"},
    "prompt_completion": {"prompt": "tea", "completion": "yes"},
    "alpaca": {"instruction": "tea", "output": "yes"},
}


@pytest.mark.parametrize("name", TEXTS)
def test_history_comes_before_a_prompt_of_text(name):
    row = TEXTS[name] | {"history": [["hello", "hi"]]}
    example = one_example(row, name, "here")
    assert said(example)[:2] == (PROMPT, "yes")
    with_system = one_example(row | {"system": "Be brief."}, name, "here")
    assert with_system.prompt == [system("Be brief."), *PROMPT]


@pytest.mark.parametrize("name", ["preference", "prompt_completion", "alpaca"])
def test_an_input_follows_the_text_of_a_prompt(name):
    assert one_example(TEXTS[name] | {"input": "with milk"}, name, "here").prompt == [user("tea\n\nwith milk")]


@pytest.mark.parametrize(
    ("name", "row", "column"),
    [
        ("preference", PAIRS["preference"] | {"history": [["a", "b"]]}, "history"),
        ("preference", PAIRS["preference"] | {"input": "a"}, "input"),
        ("preference", {"prompt": hh("a"), "chosen": "b", "rejected": "c", "input": "d"}, "input"),
        ("preference_implicit", PAIRS["preference_implicit"] | {"history": [["a", "b"]]}, "history"),
        ("prompt_completion", REPLIES["prompt_completion"] | {"history": [["a", "b"]]}, "history"),
    ],
)
def test_what_goes_with_a_prompt_of_text_alone_is_refused_beside_another(name, row, column):
    with pytest.raises(StageError, match=f"here: the column '{column}' beside .* ignore_columns"):
        one_example(row, name, "here")
    assert one_example(row | {column: None}, name, "here")


@pytest.mark.parametrize(
    "prompt",
    [
        hh("hello", "hi", "tea", ""),
        hh("hello", "hi", "tea"),
        hh("hello", "hi", "tea", "").strip(),
    ],
)
def test_a_transcript_in_the_prompt_is_read_as_its_turns(prompt):
    pair = {"prompt": prompt, "chosen": " yes", "rejected": " no"}
    assert detect_format(pair, "here") == "preference"
    example = one_example(pair, "preference", "here")
    assert said(example) == (PROMPT, "yes", "no")
    single = one_example({"prompt": prompt, "completion": " yes"}, "prompt_completion", "here")
    assert said(single) == (PROMPT, "yes", None)
    with pytest.raises(UnusableRowError, match="prompt_mismatch"):
        one_example(pair | {"chosen": " yes\n\nHuman: more\n\nAssistant: no"}, "preference", "here")


def test_transcripts_are_read_as_turns_wherever_they_stand():
    whole = {"prompt": "tea", "chosen": hh("tea", "yes"), "rejected": hh("tea", "no")}
    example = one_example(whole, "preference", "here")
    assert said(example) == ([user("tea")], "yes", "no")
    assert one_example(PAIRS["hh"], "preference_implicit", "here") == one_example(PAIRS["hh"], "hh", "here")
    headed = {"prompt": "Be brief.\n\nHuman: tea\n\nAssistant:", "completion": "yes"}
    with pytest.raises(MalformedRowError, match="expected a transcript that begins with 'Human:'"):
        one_example(headed, "prompt_completion", "here")


def test_a_text_that_speaks_of_markers_is_one_message():
    text = "Human: or\n\nAssistant – which?"
    assert one_example({"prompt": text, "completion": "yes"}, "prompt_completion", "here").prompt == [user(text)]


def test_hh_turns_begin_after_an_empty_line_only():
    row = {
        "chosen": hh("He said Human: hi.\nAssistant: what?", " yes \n\nreally "),
        "rejected": hh("He said Human: hi.\nAssistant: what?", "no"),
    }
    example = one_example(row, "hh", "here")
    assert example.prompt == [user("He said Human: hi.\nAssistant: what?")]
    assert example.reply == bot("yes \n\nreally")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (hh("a", ""), hh("a", "no"), "empty_reply"),
        (hh("a", "yes"), hh("a", " "), "empty_reply"),
        (hh("a"), hh("a", "no"), "ends_with_user"),
        (hh("a", "yes"), hh("b", "no"), "prompt_mismatch"),
        (hh("a", "b", "c", "yes"), hh("a", "no"), "prompt_mismatch"),
        (hh("a", "yes"), hh("a", "yes "), "equal_replies"),
        (hh("a", "", "c", "yes"), hh("a", "", "c", "no"), "empty_message"),
        (hh("a") + hh("b", "yes"), hh("a") + hh("b", "no"), "not_alternating"),
        (hh("a", "b") + "\n\nAssistant: yes", hh("a", "b") + "\n\nAssistant: no", "not_alternating"),
        ("\n\nAssistant: yes", "\n\nAssistant: no", "empty_prompt"),
        ("Human: a", hh("a", "no"), "not_a_transcript"),
        (hh("a", "half \ud83d"), hh("a", "no"), "invalid_unicode"),
    ],
)
def test_unusable_hh_rows_have_a_reason(chosen, rejected, reason):
    with pytest.raises(UnusableRowError, match=f"^{reason}$"):
        one_example({"chosen": chosen, "rejected": rejected}, "hh", "here")


def test_preference_takes_texts_and_a_prompt_said_twice():
    texts = one_example({"prompt": "tea", "chosen": "yes", "rejected": "no"}, "preference", "here")
    twice = {"prompt": "tea", "chosen": [user("tea"), bot("yes")], "rejected": [user("tea"), bot("no")]}
    assert texts == one_example(twice, "preference", "here")
    assert said(texts) == ([user("tea")], "yes", "no")
    other = twice | {"chosen": [user("milk"), bot("yes")]}
    with pytest.raises(UnusableRowError, match="prompt_mismatch"):
        one_example(other, "preference", "here")


def test_implicit_prompt_of_texts_ends_with_a_whole_word():
    row = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    assert detect_format(row, "here") == "preference_implicit"
    example = one_example(row, "preference_implicit", "here")
    assert said(example) == ([user("The sky is")], "blue.", "black.")
    with pytest.raises(UnusableRowError, match="empty_prompt"):
        one_example({"chosen": "yes", "rejected": "no"}, "preference_implicit", "here")


@pytest.mark.parametrize("column", ["prompt", "instruction", "question", "messages"])
def test_texts_that_begin_alike_are_not_split_beside_a_prompt(column):
    row = {"chosen": "The sky is blue.", "rejected": "The sky is black.", column: "What is the sky like?"}
    with pytest.raises(StageError, match=rf"here: the column '{column}' beside texts that begin with their prompt"):
        one_example(row, "preference_implicit")


def test_alpaca_joins_instruction_and_input_and_takes_a_system_message():
    row = {"instruction": "Translate.", "input": "tea", "output": "thé", "system": "Be brief."}
    assert one_example(row, "alpaca", "here").prompt == [system("Be brief."), user("Translate.\n\ntea")]
    assert one_example(row | {"input": None, "system": ""}, "alpaca", "here").prompt == [user("Translate.")]


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"prompt": "a", "chosen": hh("a", "yes"), "rejected": hh("a", "no")}, ("hh", "preference")),
        ({"query": "a", "chosen": "yes", "rejected": "no"}, ("preference_implicit (", "preference (", "in columns")),
        (PAIRS["preference"] | {"messages": []}, ("preference", "messages_preference")),
        ({"words": "a"}, ("hh", "sharegpt", "instruction")),
        ({"text": "a", "prompt": "b"}, ("prompt", "text")),
        ({"text": "a", "comment": "b"}, ("text", "comment")),
        ({"prompt": "a", "response": "b"}, ("prompt", "response", "comparison")),
        ({"instruction": "a", "output": "b", "chosen": "c", "rejected": "d"}, ("alpaca_preference", "alpaca")),
    ],
)
def test_uncertain_detection_lists_the_candidates(row, names):
    with pytest.raises(StageError) as caught:
        detect_format(row, "a.jsonl, line 1")
    message = str(caught.value)
    assert message.startswith("a.jsonl, line 1: columns ")
    assert all(name in message for name in names)


OPENAI = PAIRS["openai_preference"]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("hh", {"chosen": "x"}, "here: format 'hh' needs the column 'rejected', found chosen"),
        ("hh", {"chosen": 3, "rejected": "x"}, "here, 'chosen': expected text, found int"),
        ("preference", {"prompt": {}, "chosen": "a", "rejected": "b"}, "here, 'prompt': expected text, found dict"),
        ("messages", {"messages": "a"}, "here, 'messages': expected a list of messages, found str"),
        ("messages", {"messages": [user("a"), {"role": "judge", "content": "b"}]}, "message 2: unknown role 'judge'"),
        ("messages", {"messages": [{"from": "human"}]}, "message 1: expected a message with 'from' and 'value'"),
        ("messages", {"messages": [{"text": "a"}]}, "message 1: expected a message with 'role' and 'content'"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [1]}]},
            "message 1, 'content', part 1: expected text, or a part of type 'text', found int",
        ),
        ("openai_preference", OPENAI | {"input": [user("a")]}, "here, 'input': expected an object with 'messages'"),
        (
            "openai_preference",
            OPENAI | {"input": {"messages": [user("a")], "system": "b"}},
            "here, 'input': 'system' is read by nothing here",
        ),
        ("alpaca", {"instruction": "a", "output": "b", "history": ["c"]}, "here, 'history': expected a list of pairs"),
    ],
)
def test_a_malformed_row_is_an_error_that_says_where(name, row, message):
    with pytest.raises(StageError) as caught:
        one_example(row, name, "here")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("messages", {"messages": [user("a"), {"role": "judge", "content": "b"}]}, "unsupported_role"),
        ("messages", {"messages": [{"role": ["user"], "content": "a"}, bot("b")]}, "unsupported_role"),
        ("messages", {"messages": [{"role": None, "content": "a"}, bot("b")]}, "unsupported_role"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content_not_text"),
        ("messages", {"messages": "a"}, "not_messages"),
        ("messages", {"messages": [5]}, "not_messages"),
        ("prompt_completion", {"prompt": True, "completion": "a"}, "content_not_text"),
        ("prompt_completion", {"prompt": "a", "completion": 5}, "content_not_text"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["c"]]}, "bad_history"),
        ("alpaca", {"instruction": "a"}, "missing_column"),
    ],
)
def test_a_malformed_row_has_a_reason_to_be_counted_by(name, row, reason):
    with pytest.raises(MalformedRowError) as caught:
        one_example(row, name, "here")
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "empty_reply"),
        ([user("a")], "ends_with_user"),
        ([user("a"), bot("")], "empty_reply"),
        ([user("a"), bot("b"), system("c")], "ends_with_system"),
    ],
)
def test_a_conversation_without_a_reply_says_why(messages, reason):
    with pytest.raises(UnusableRowError, match=f"^{reason}$"):
        one_example({"messages": messages}, "messages", "here")
    with pytest.raises(UnusableRowError, match=f"^{reason}$"):
        one_example({"prompt": "a", "completion": messages}, "prompt_completion", "here")


def test_a_column_that_rides_on_as_a_fact_is_no_reply_unless_a_format_needs_it():
    assert detect_format({"prompt": "a", "solution": "b"}, "here", ("solution",)) == "prompt"
    assert detect_format({"text": "a", "url": "b"}, "here", ("url",)) == "text"
    assert detect_format({"question": "a", "answer": "b"}, "here", ("answer",)) == "question_answer"
    with pytest.raises(StageError, match="a reply may stand in other"):
        detect_format({"prompt": "a", "solution": "b", "other": "c"}, "here", ("solution",))


def test_a_score_that_gives_the_label_takes_the_place_of_the_column():
    scored = columns_read("messages", options(threshold={"score": "stars"}))
    assert scored == {"messages", "system", "tools", "functions", "chat_template_kwargs", "stars"}
    assert "label" in columns_read("messages", options())
    assert "label" in columns_read("messages", options(threshold={"score": "label"}))


@pytest.mark.parametrize(
    ("label", "expected"), [(True, True), (False, False), ("True", True), (" false ", False), ("TRUE", True)]
)
def test_a_label_says_whether_a_single_reply_is_good(label, expected):
    for name, row in REPLIES.items():
        assert one_example(row | {"label": label}, name).label is expected


@pytest.mark.parametrize("label", [0, 1, "1", "good", None, "", [True]])
def test_a_label_of_another_kind_is_not_guessed(label):
    with pytest.raises(MalformedRowError, match="here, 'label': expected true or false") as caught:
        one_example(REPLIES["messages"] | {"label": label}, "messages")
    assert caught.value.reason == "bad_label"


def test_all_rows_are_of_the_format_of_the_first():
    formats = FormatOfRows("auto")
    assert formats.of(PAIRS["preference"], "a.jsonl, line 1") == "preference"
    assert formats.of(PAIRS["preference"] | {"margin": 1}, "b.jsonl, line 1") == "preference"
    assert formats.of({"prompt": "a"}, "b.jsonl, line 2") == "preference"  # examples_of says what it lacks
    formats = FormatOfRows("auto")
    assert formats.of({"chosen": "tea yes", "rejected": "tea no"}, "a.jsonl, line 1") == "preference_implicit"
    with pytest.raises(StageError, match=r"b.jsonl, line 1: .* 'preference', and a.jsonl, line 1 of 'preference_impl"):
        formats.of(TEXTS["preference"], "b.jsonl, line 1")
    with pytest.raises(StageError, match=r"a.jsonl, line 2: .* 'preference', and a.jsonl, line 1 of 'preference_impl"):
        formats.of(TEXTS["preference"], "a.jsonl, line 2")
    with pytest.raises(StageError, match=r"b.jsonl, line 1: .* 'hh', and a.jsonl, line 1 of 'preference_implicit'"):
        formats.of(PAIRS["hh"], "b.jsonl, line 1")
    assert FormatOfRows("preference_implicit").of(TEXTS["preference"], "b.jsonl, line 1") == "preference_implicit"


@pytest.mark.parametrize(
    ("file", "name"),
    [("data/demo/dpo_en_demo.json", "sharegpt_preference"), ("data/demo/alpaca_en_demo.json", "alpaca")],
)
def test_real_demonstration_files_are_read_whole(file, name):
    rows = json.loads(real_file(file).read_text(encoding="utf-8"))
    assert {detect_format(row, "here") for row in rows} == {name}
    for row in rows:
        example = one_example(row, name, "here")
        if name == "alpaca":
            assert example.reply == bot(row["output"])
            assert row["instruction"] in example.prompt[-1]["content"]
        else:
            assert [turn["content"] for turn in example.prompt] == [turn["value"] for turn in row["conversations"]]
            assert said(example)[1:] == (row["chosen"]["value"], row["rejected"]["value"])


def test_the_real_unpaired_file_is_read_whole_with_its_labels():
    rows = json.loads(real_file("data/demo/kto_en_demo.json").read_text(encoding="utf-8"))
    assert {detect_format(row, "here") for row in rows} == {"messages"}
    examples = [one_example(row, "messages") for row in rows]
    assert [example.label for example in examples] == [row["label"] for row in rows]
    assert [[*example.prompt, example.reply] for example in examples] == [
        [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]] for row in rows
    ]
    assert sum(example.label for example in examples) == 150


def test_the_real_file_of_tool_calls_is_read_whole():
    rows = json.loads(real_file("data/demo/glaive_toolcall_en_demo.json").read_text(encoding="utf-8"))
    assert {detect_format(row, "here") for row in rows} == {"sharegpt"}
    examples = [one_example(row, "sharegpt") for row in rows]
    for row, example in zip(rows, examples, strict=True):
        turns = [*example.prompt, example.reply]
        given = row["conversations"]
        roles = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
        assert [turn["role"] for turn in turns] == [roles[turn["from"]] for turn in given]
        for turn, raw in zip(turns, given, strict=True):
            if raw["from"] == "function_call":
                assert [call["function"] for call in turn["tool_calls"]] == [json.loads(raw["value"])]
            else:
                assert turn["content"] == raw["value"]
        tools = [tool["function"] for tool in example.tools or []]
        assert tools == json.loads(row["tools"])
    assert sum("tool_calls" in turn for example in examples for turn in example.prompt) == 211


def test_the_real_question_and_answer_file_rides_its_answer_along():
    lines = real_file("data/gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines):
        assert detect_format(row, "here") == "question_answer"
        example = one_example(row, "question_answer", facts=picked_facts(row, ("answer",), "here"))
        assert said(example) == ([user(row["question"])], row["answer"], None)
        assert example.facts == {"answer": row["answer"]}
