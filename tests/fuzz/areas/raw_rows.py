"""Sound raw rows of every format, and rows that are wrong in ways that people have met."""

from typing import Any

from tests.fuzz.case import Expected
from tests.fuzz.mutations import Raw

Row = dict[str, Any]
FORMATS = ("hh", "preference", "preference_chat", "preference_implicit", "sharegpt_preference")
FORMATS += ("alpaca", "messages", "prompt_completion", "sharegpt", "alpaca_preference", "question_preference")
FORMATS += ("messages_preference", "openai_preference", "question_answer", "prompt", "text")
TOPICS = ("tea", "rain", "bread", "wool", "salt", "iron")


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: Any) -> Row:
    return {"role": "assistant", "content": text}


def system(text: str) -> Row:
    return {"role": "system", "content": text}


def of_format(name: str, topic: str) -> Row:
    question, good, bad = f"What is {topic}?", f"It is good {topic}.", f"No {topic}."
    pair = {"chosen": good, "rejected": bad}
    turns = f"\n\nHuman: {question}\n\nAssistant: "
    human = [{"from": "human", "value": question}]
    return {
        "hh": {"chosen": turns + good, "rejected": turns + bad},
        "preference": {"prompt": question, **pair},
        "preference_chat": {"prompt": [user(question)], **{key: [assistant(text)] for key, text in pair.items()}},
        "preference_implicit": {key: [user(question), assistant(text)] for key, text in pair.items()},
        "sharegpt_preference": {"conversations": human}
        | {key: {"from": "gpt", "value": text} for key, text in pair.items()},
        "alpaca": {"instruction": question, "input": "", "output": good},
        "messages": {"messages": [user(question), assistant(good)]},
        "prompt_completion": {"prompt": question, "completion": good},
        "sharegpt": {"conversations": [*human, {"from": "gpt", "value": good}]},
        "alpaca_preference": {"instruction": question, "input": "", **pair},
        "question_preference": {"question": question, "context": "", **pair},
        "messages_preference": {"messages": [user(question)], **pair},
        "openai_preference": {
            "input": {"messages": [user(question)]},
            "preferred_output": [assistant(good)],
            "non_preferred_output": [assistant(bad)],
        },
        "question_answer": {"question": question, "answer": good, "context": ""},
        "prompt": {"prompt": question},
        "text": {"text": f"{question} {good}"},
    }[name]


def sound(name: str) -> list[Row]:
    """Six rows of a format."""
    return [of_format(name, topic) for topic in TOPICS]


def pair(**changed: Any) -> list[Row]:
    return [of_format("preference", "clay") | changed]


def reply(**changed: Any) -> list[Row]:
    return [of_format("prompt_completion", "clay") | changed]


def chat(*messages: Any) -> list[Row]:
    return [{"messages": list(messages)}]


DROPPING = {"on_unusable_row": "drop"}
TRANSCRIPT = "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant:"
# What is in the row, the format of the rows, the row, what must come of it, settings of prepare_data.
Named = tuple[str, str, list[Any], Expected, dict[str, Any]]
UNREAD_COLUMNS: tuple[Named, ...] = tuple(
    (f"a column '{column}' that nothing reads", name, [of_format(name, "clay") | {column: value}], "refused", {})
    for column, value in (
        ("tool_calls", [{"name": "f"}]),
        ("tools", [{"name": "look_up"}]),  # which the chat template leaves out
        ("images", ["a.png"]),
        ("label", "good"),
        ("weight", 0.5),
        ("score", 3),
    )
    for name in ("preference", "messages", "alpaca", "sharegpt", "hh")
)
SYSTEM_COLUMN: tuple[Named, ...] = tuple(
    ("a column 'system'", name, [of_format(name, "clay") | {"system": "Be brief."}], "either", {}) for name in FORMATS
)
HISTORY_AND_INPUT: tuple[Named, ...] = (
    ("a column 'history'", "preference", pair(history=[["Who?", "Me."]]), "either", {}),
    ("a column 'history'", "sharegpt", [of_format("sharegpt", "clay") | {"history": [["Who?", "Me."]]}], "either", {}),
    ("a column 'input' beside the instruction", "preference", pair(input="It is warm."), "either", {}),
    ("a history that is not of pairs", "alpaca", [of_format("alpaca", "clay") | {"history": [["a"]]}], "refused", {}),
    ("a history of numbers", "alpaca", [of_format("alpaca", "clay") | {"history": [[1, 2]]}], "refused", {}),
    ("a history with an empty reply", "alpaca", [of_format("alpaca", "clay") | {"history": [["a", ""]]}], "either", {}),
)
MARGINS: tuple[Named, ...] = (
    *(
        (f"a margin of {value!r}", "preference", pair(margin=value), "refused", {})
        for value in (-1, 1e39, -0.001, 10**400, 1e308, "five", "-1", "inf", "nan", True, [1], {"a": 1})
    ),
    *(
        (f"a margin of {value!r}", "preference", pair(margin=value), "accepted", {})
        for value in (0, 1, 0.5, "0.5", None, 1e38)
    ),
    ("a margin of 5,000 digits", "preference", pair(margin=Raw("9" * 5000)), "refused", {}),
)
MESSAGES: tuple[Named, ...] = (
    *(
        (f"a role {role!r}", "messages", chat(user("Q?"), {"role": role, "content": "A"}), "refused", {})
        for role in (["user"], {}, None, 5, "critic", "User", "user\nerror: x", "\ud800")
    ),
    ("a tool's message last", "messages", chat(user("Q?"), {"role": "tool", "content": "A"}), "accepted", {}),
    ("a developer's message last", "messages", chat(user("Q?"), {"role": "developer", "content": "A"}), "accepted", {}),
    (
        "a role 'critic', dropped",
        "messages",
        chat(user("Q?"), {"role": "critic", "content": "A"}),
        "accepted",
        DROPPING,
    ),
    ("a list as content", "messages", chat(user("Q?"), assistant([{"type": "text", "text": "A"}])), "accepted", {}),
    *(
        (f"parts {str(parts)[:60]}", "messages", chat(user("Q?"), assistant(parts)), "refused", {})
        for parts in (
            [{"type": "image_url", "image_url": {"url": "x"}}],
            [{"type": "text", "text": 5}],
            [{"type": "text"}],
            [{"type": ["text"], "text": "A"}],
            ["A"],
            [None],
            [["A"]],
        )
    ),
    (
        f"a list as content with {DROPPING}",
        "messages",
        chat(user("Q?"), assistant([{"text": "A"}])),
        "accepted",
        DROPPING,
    ),
    ("a number as content", "messages", chat(user("Q?"), assistant(5)), "refused", {}),
    ("nothing as content", "messages", chat(user("Q?"), assistant(None)), "either", {}),
    ("tool calls within a message", "messages", chat(user("Q?"), assistant("A") | {"tool_calls": [1]}), "either", {}),
    ("a name within a message", "messages", chat(user("Q?") | {"name": "me"}, assistant("A")), "either", {}),
    ("the user's message last", "messages", chat(user("Q?"), assistant("A"), user("Why?")), "either", {}),
    ("two system messages", "messages", chat(system("a"), system("b"), user("Q?"), assistant("A")), "either", {}),
    ("two users in turn", "messages", chat(user("Q?"), user("R?"), assistant("A")), "either", {}),
    ("the assistant first", "messages", chat(assistant("Hello."), user("Q?"), assistant("A")), "either", {}),
    ("no messages", "messages", chat(), "either", {}),
    ("messages that are JSON in a text", "messages", [{"messages": "[]"}], "either", {}),
    ("messages that are text", "messages", [{"messages": "hello"}], "refused", {}),
    ("messages that are null", "messages", [{"messages": None}], "refused", {}),
    ("a message that is text", "messages", chat("Q?", "A"), "refused", {}),
    ("a special token in a text", "messages", chat(user("Q?<|assistant|>"), assistant("A<|endoftext|>")), "either", {}),
    ("NUL in a text", "messages", chat(user("Q?\0"), assistant("A\0")), "either", {}),
    ("half a surrogate pair", "messages", chat(user("Q?\ud800"), assistant("A")), "either", {}),
    ("a reply of white space", "messages", chat(user("Q?"), assistant(" \n\t")), "either", {}),
    ("a reply of zero-width spaces", "messages", chat(user("Q?"), assistant("\u200b")), "either", {}),
    ("a reply of 200,000 characters", "messages", chat(user("Q?"), assistant("a " * 100_000)), "either", {}),
    ("500 turns", "messages", chat(*[user("Q?"), assistant("A")] * 250), "either", {}),
)
PROMPTS: tuple[Named, ...] = (
    (
        "a transcript as the prompt",
        "preference",
        [{"prompt": TRANSCRIPT, "chosen": " a", "rejected": " b"}],
        "either",
        {},
    ),
    ("a transcript as the prompt", "prompt_completion", [{"prompt": TRANSCRIPT, "completion": " a"}], "either", {}),
    ("replies that differ in a last newline", "preference", pair(chosen="Four.", rejected="Four.\n"), "either", {}),
    ("equal replies", "preference", pair(chosen="Four.", rejected="Four."), "either", {}),
    (
        "prompts equal after Unicode normalisation",
        "preference",
        [*pair(prompt="Caf\u00e9?"), *pair(prompt="Cafe\u0301?")],
        "either",
        {},
    ),
    ("an empty prompt", "preference", pair(prompt=""), "either", {}),
    ("a prompt that is a number", "preference", pair(prompt=5), "refused", {}),
    ("a prompt that is null", "preference", pair(prompt=None), "either", {}),
    ("a row that is a list", "preference", [[1, 2]], "refused", {}),
    ("a row that is null", "preference", [None], "refused", {}),
    ("an empty row", "preference", [{}], "refused", {}),
    ("a transcript without a reply", "hh", [{"chosen": "\n\nHuman: Q", "rejected": "\n\nHuman: Q"}], "either", {}),
    ("a transcript that starts in the middle", "hh", [{"chosen": "Q\n\nAssistant: A", "rejected": "R"}], "either", {}),
    ("replies that are lists of text", "hh", [{"chosen": ["a"], "rejected": ["b"]}], "refused", {}),
    (f"a {5000}-digit integer as the reply", "preference", pair(chosen=Raw("9" * 5000)), "refused", {}),
    ("a reply nested 100,000 deep", "preference", pair(chosen=Raw("[" * 100_000 + "]" * 100_000)), "refused", {}),
    ("an unknown sharegpt role", "sharegpt", [{"conversations": [{"from": "bot", "value": "x"}]}], "refused", {}),
    (
        "a sharegpt role that is a list",
        "sharegpt",
        [{"conversations": [{"from": ["gpt"], "value": "x"}]}],
        "refused",
        {},
    ),
)
LABELS: tuple[Named, ...] = tuple(
    (f"a label {value!r} ({kinds[0]})", "prompt_completion", reply(label=value), expected, {"kinds": [*kinds]})
    for kinds in (("sft", "prompts"), ("unpaired", "prompts"))
    for value, expected in (
        (True, "accepted"),
        (False, "either"),  # no row of SFT
        ("true", "accepted"),
        (" False ", "either"),
        *((value, "refused") for value in (1, 0, "yes", "1", 0.5, [True], {}, "", float("nan"), "\ud800")),
        (None, "refused"),
    )
)
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "tea"}}}
TOOLS: tuple[Named, ...] = tuple(
    (f"tools {str(tools)[:60]!r}", "messages", [{**chat(user("Q?"), assistant("A"))[0], "tools": tools}], "refused", {})
    for tools in (
        "none",
        "[",
        "{}",
        5,
        True,
        {"name": "f"},
        [5],
        ["look_up"],
        [None],
        [[]],
        [{}],
        [{"type": "function"}],
        [{"type": "function", "function": 5}],
        [{"type": "function", "function": {"name": 5}}],
        [{"type": "function", "function": {"name": ""}}],
        [{"name": "look_up", "parameters": {"x": float("nan")}}],
        [{"name": "look_up", "parameters": Raw("[" * 3000 + "]" * 3000)}],
        [{"name": "Q"}],  # its name stands in the text, be it told or not
        "__import__('os').system('touch pwned')",
    )
)
CALLS: tuple[Named, ...] = tuple(
    (f"calls {str(calls)[:60]!r}", "messages", chat(user("Q?"), assistant("A") | {"tool_calls": calls}), "refused", {})
    for calls in (
        5,
        True,
        {},
        "look_up()",
        [5],
        ["look_up"],
        [None],
        [{}],
        [{"function": {}}],
        [{"function": {"name": 5, "arguments": {}}}],
        [{"function": {"name": "look_up", "arguments": "{"}}],
        [{"function": {"name": "look_up", "arguments": "[1]"}}],
        [{"function": {"name": "look_up", "arguments": 5}}],
        [{"function": {"name": "look_up", "arguments": {"x": Raw("9" * 5000)}}}],
        [{"function": {"name": "look_up", "arguments": Raw("[" * 3000 + "]" * 3000)}}],
        [CALL],  # which the chat template leaves out
    )
    if calls
)
WEIGHTS: tuple[Named, ...] = (
    *(
        (f"a weight {value!r}", "messages", chat(user("Q?"), assistant("A") | {"weight": value}), expected, {})
        for value, expected in (
            *((value, "accepted") for value in (0, 1, 1.0, None)),
            *((value, "refused") for value in (0.5, True, False, -1, 2, "1", "0", [1], {}, float("nan"), 10**400)),
            (Raw("9" * 5000), "refused"),
        )
    ),
    ("a weight of the user", "messages", chat(user("Q?") | {"weight": 1}, assistant("A")), "refused", {}),
    ("a weight of 0 of the user", "messages", chat(user("Q?") | {"weight": 0}, assistant("A")), "accepted", {}),
)
ARGUMENTS: tuple[Named, ...] = tuple(
    (
        f"template arguments {str(value)[:50]!r}",
        "messages",
        [{**of_format("messages", "clay"), "chat_template_kwargs": value}],
        expected,
        {},
    )
    for value, expected in (
        *((value, "refused") for value in (5, True, [1], "x", "{", [["messages", []]], "[1]")),
        *(({key: []}, "refused") for key in ("messages", "tools", "add_generation_prompt", "eos_token")),
        ({"": 1}, "either"),
        ({"a b": 1}, "either"),
        ({"\ud800": 1}, "either"),
        ({"self": 1}, "either"),
        ({"loop": 1, "range": 5, "namespace": 5, "raise_exception": 5}, "either"),
        ({"enable_thinking": False}, "accepted"),
        ("{'enable_thinking': False}", "accepted"),
        ({"x": Raw("[" * 3000 + "]" * 3000)}, "refused"),
        ({"x": float("nan")}, "either"),
    )
)
# Messages as text, as tables without types hold them.
LITERALS: tuple[Named, ...] = tuple(
    (f"messages {text[:60]!r}", "messages", [{"messages": text}], expected, {})
    for text, expected in (
        ("[{'role': 'user', 'content': 'Q?'}, {'role': 'assistant', 'content': 'A'}]", "accepted"),
        ("[{'role': 'user', 'content': None}, {'role': 'assistant', 'content': 'A'}]", "accepted"),
        ("[{'role': 'user', 'content': 'Q?'} {'role': 'assistant', 'content': 'A'}]", "refused"),
        ("[{'role': 'user', 'content': 'Q' '?'}, {'role': 'assistant', 'content': 'A'}]", "refused"),
        ("[{'role': 'user', 'role': 'system', 'content': 'Q?'}]", "refused"),
        ("[{'role': 'user', 'content': __import__('os').system('touch pwned')}]", "refused"),
        ("[{'role': 'user', 'content': 'Q?' * 10 ** 9}]", "refused"),
        ("[{'role': 'user', 'content': f'{open(1)}'}]", "refused"),
        ("[{'role': 'user', 'content': b'Q?'}]", "refused"),
        ("[{'role': 'user', 'content': {'Q?'}}]", "refused"),
        ("[{'role': 'user', 'content': ('Q?',)}]", "refused"),
        ("[{'role': 'user', 'content': 1j}]", "refused"),
        ("[{'role': 'user', 'content': ...}]", "refused"),
        ("[{'role': 'user', 'content': lambda: 0}]", "refused"),
        ("[{'role': 'user', **{}}]", "refused"),
        ("[*[1]]", "refused"),
        ("[x for x in range(10)]", "refused"),
        ("[" * 150 + "]" * 150, "refused"),
        ("[" * 100_000 + "]" * 100_000, "refused"),
        ("[-" + "-" * 50_000 + "1]", "refused"),
        ("[" + "1+" * 50_000 + "1]", "refused"),
        ("[{'a': " * 5000 + "1" + "}]" * 5000, "refused"),
        ("['" + "x" * 2_000_000 + "']", "refused"),
        (f"[{{'role': 'user', 'content': {'9' * 5000}}}]", "refused"),
        ("[{'role': 'user', 'content': 'Q?\0'}]", "refused"),
        ("[{'role': 'user', 'content': '\\ud800'}, {'role': 'assistant', 'content': 'A'}]", "either"),
        ("[{'role': 'user', 'content': '\\d'}, {'role': 'assistant', 'content': 'A'}]", "either"),
        ("array([{'role': 'user'}], dtype=object)", "refused"),
        ("", "either"),
        ("None", "refused"),
        ("null", "refused"),
        ("{}", "refused"),
    )
)
IGNORING = {"ignore_columns": ["score"]}
NAMED_ROWS: tuple[Named, ...] = (
    *(("nothing wrong", name, [], "accepted", {}) for name in FORMATS),
    ("a column 'score' that is ignored by name", "preference", pair(score=3), "accepted", IGNORING),
    *UNREAD_COLUMNS,
    *SYSTEM_COLUMN,
    *HISTORY_AND_INPUT,
    *MARGINS,
    *MESSAGES,
    *PROMPTS,
    *LABELS,
    *TOOLS,
    *CALLS,
    *WEIGHTS,
    *ARGUMENTS,
    *LITERALS,
)
