import json

import pytest

from stages.lib.conversations import UnusableRowError
from stages.lib.errors import StageError
from stages.lib.formats import READERS, detect_format, read_example, renamed
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
}


@pytest.mark.parametrize("name", READERS)
def test_every_format_is_detected_and_read_alike(name):
    row = (PAIRS | REPLIES)[name]
    assert detect_format(row, "here") == name
    example = read_example(row, name, "here")
    assert example.prompt == PROMPT
    assert example.reply == "yes"
    assert example.rejected == ("no" if name in PAIRS else None)
    assert example.margin is None


@pytest.mark.parametrize("name", PAIRS)
def test_margin_is_kept_beside_every_kind_of_pair(name):
    assert read_example(PAIRS[name] | {"margin": 2}, name, "here").margin == 2.0
    assert read_example(PAIRS[name] | {"margin": "0.5"}, name, "here").margin == 0.5
    for wrong in (True, "much", float("nan"), [1]):
        with pytest.raises(StageError, match=r"here, 'margin': expected a finite number"):
            read_example(PAIRS[name] | {"margin": wrong}, name, "here")


def test_hh_turns_begin_after_an_empty_line_only():
    row = {
        "chosen": hh("He said Human: hi.\nAssistant: what?", " yes \n\nreally "),
        "rejected": hh("He said Human: hi.\nAssistant: what?", "no"),
    }
    example = read_example(row, "hh", "here")
    assert example.prompt == [user("He said Human: hi.\nAssistant: what?")]
    assert example.reply == "yes \n\nreally"


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (hh("a", ""), hh("a", "no"), "empty_reply"),
        (hh("a", "yes"), hh("a", " "), "empty_reply"),
        (hh("a"), hh("a", "no"), "empty_reply"),
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
        read_example({"chosen": chosen, "rejected": rejected}, "hh", "here")


def test_preference_takes_texts_and_a_prompt_said_twice():
    texts = read_example({"prompt": "tea", "chosen": "yes", "rejected": "no"}, "preference", "here")
    twice = {"prompt": "tea", "chosen": [user("tea"), bot("yes")], "rejected": [user("tea"), bot("no")]}
    assert texts == read_example(twice, "preference", "here")
    assert (texts.prompt, texts.reply, texts.rejected) == ([user("tea")], "yes", "no")
    other = twice | {"chosen": [user("milk"), bot("yes")]}
    with pytest.raises(UnusableRowError, match="prompt_mismatch"):
        read_example(other, "preference", "here")


def test_implicit_prompt_of_texts_ends_with_a_whole_word():
    row = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    assert detect_format(row, "here") == "preference_implicit"
    example = read_example(row, "preference_implicit", "here")
    assert (example.prompt, example.reply, example.rejected) == ([user("The sky is")], "blue.", "black.")
    with pytest.raises(UnusableRowError, match="empty_prompt"):
        read_example({"chosen": "yes", "rejected": "no"}, "preference_implicit", "here")


def test_alpaca_joins_instruction_and_input_and_takes_a_system_message():
    row = {"instruction": "Translate.", "input": "tea", "output": "thé", "system": "Be brief."}
    assert read_example(row, "alpaca", "here").prompt == [system("Be brief."), user("Translate.\n\ntea")]
    assert read_example(row | {"input": None, "system": ""}, "alpaca", "here").prompt == [user("Translate.")]


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"prompt": "a", "chosen": hh("a", "yes"), "rejected": hh("a", "no")}, ("hh", "preference")),
        ({"question": "a", "chosen": "yes", "rejected": "no"}, ("preference_implicit", "preference")),
        (PAIRS["preference"] | {"messages": []}, ("preference", "messages")),
        ({"text": "a"}, ("hh", "sharegpt", "instruction")),
    ],
)
def test_uncertain_detection_lists_the_candidates(row, names):
    with pytest.raises(StageError) as caught:
        detect_format(row, "a.jsonl, line 1")
    message = str(caught.value)
    assert message.startswith("a.jsonl, line 1: columns ")
    assert all(name in message for name in names)


def test_unpaired_preferences_are_refused():
    with pytest.raises(StageError, match="unpaired"):
        detect_format({"messages": [user("a"), bot("b")], "label": True}, "here")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("hh", {"chosen": "x"}, "here: format 'hh' needs the column 'rejected', found chosen"),
        ("hh", {"chosen": 3, "rejected": "x"}, "here, 'chosen': expected text, found int"),
        ("preference", {"prompt": {}, "chosen": "a", "rejected": "b"}, "here, 'prompt': expected text, found dict"),
        ("messages", {"messages": "a"}, "here, 'messages': expected a list of messages, found str"),
        ("messages", {"messages": [user("a"), {"role": "tool", "content": "b"}]}, "message 2: unknown role 'tool'"),
        ("messages", {"messages": [{"from": "human"}]}, "message 1: expected a message with 'role' and 'content'"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [1]}]},
            "message 1, 'content': expected text, found list",
        ),
        ("alpaca", {"instruction": "a", "output": "b", "history": ["c"]}, "here, 'history': expected a list of pairs"),
    ],
)
def test_a_malformed_row_is_an_error_that_says_where(name, row, message):
    with pytest.raises(StageError) as caught:
        read_example(row, name, "here")
    assert message in str(caught.value)


def test_columns_are_renamed_and_may_change_places():
    row = {"chosen": "worse", "rejected": "better", "query": "a", "prompt": "old"}
    columns = {"chosen": "rejected", "rejected": "chosen", "query": "prompt"}
    assert renamed(row, columns, "here") == {"chosen": "better", "rejected": "worse", "prompt": "a"}
    with pytest.raises(StageError, match="here: no column 'question' to rename, found chosen"):
        renamed(row, {"question": "prompt"}, "here")


@pytest.mark.parametrize(
    ("file", "name"),
    [("data/demo/dpo_en_demo.json", "sharegpt_preference"), ("data/demo/alpaca_en_demo.json", "alpaca")],
)
def test_real_demonstration_files_are_read_whole(file, name):
    rows = json.loads(real_file(file).read_text(encoding="utf-8"))
    assert {detect_format(row, "here") for row in rows} == {name}
    for row in rows:
        example = read_example(row, name, "here")
        if name == "alpaca":
            assert example.reply == row["output"]
            assert row["instruction"] in example.prompt[-1]["content"]
        else:
            assert [turn["content"] for turn in example.prompt] == [turn["value"] for turn in row["conversations"]]
            assert (example.reply, example.rejected) == (row["chosen"]["value"], row["rejected"]["value"])


def test_real_unpaired_and_tool_files_are_refused():
    unpaired = json.loads(real_file("data/demo/kto_en_demo.json").read_text(encoding="utf-8"))[0]
    with pytest.raises(StageError, match="unpaired"):
        detect_format(unpaired, "here")
    tools = json.loads(real_file("data/demo/glaive_toolcall_en_demo.json").read_text(encoding="utf-8"))[0]
    with pytest.raises(StageError, match="unknown role 'function_call'"):
        read_example(tools, detect_format(tools, "here"), "here")
