"""One small example of each format and shape of raw data: what it holds, how it is read, and what it becomes.

Each is a test (`test_format_examples.py`) and a row of `docs/formats.md` (`format_table.py`).
"""

from dataclasses import dataclass, field
from typing import Any

from stages.lib.data.prepared_rows import Kind


@dataclass(frozen=True)
class FormatExample:
    what: str
    format: str  # as it is detected
    rows: list[dict[str, Any]]
    becomes: list[dict[str, Any]]  # prepared rows, without the source's name
    options: dict[str, Any] = field(default_factory=dict)  # of the source: keys that are not as they are by default
    columns: dict[str, str] = field(default_factory=dict)
    facts: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """The kind of rows that it is for."""
        values = self.becomes[0]
        if "chosen" in values:
            return "preference"
        if "completion" in values:
            return "unpaired"
        return "sft" if {"messages", "text"} & values.keys() else "prompts"


def user(text):
    return {"role": "user", "content": text}


def bot(text, **other):
    return {"role": "assistant", "content": text} | other


def system(text):
    return {"role": "system", "content": text}


def pair(prompt, chosen, rejected, **other):
    return {"prompt": [user(prompt)], "chosen": [bot(chosen)], "rejected": [bot(rejected)]} | other


def labelled(prompt, reply, label, **other):
    return {"prompt": [user(prompt)], "completion": [bot(reply)], "label": label} | other


WEATHER = {"name": "weather", "description": "Today's weather", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": WEATHER}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
TEXTS_AND_PROMPTS = [
    FormatExample("text to be trained as a whole, or a raw prompt", "text", [{"text": "Once."}], [{"text": "Once."}]),
    FormatExample("prompts alone (TRL's prompt-only)", "prompt", [{"prompt": "Tea?"}], [{"prompt": [user("Tea?")]}]),
    FormatExample(
        "prompts of messages, under another name (OpenRLHF's `input_key`)",
        "prompt",
        [{"context_messages": [system("Be brief."), user("Tea?")]}],
        [{"prompt": [system("Be brief."), user("Tea?")]}],
        columns={"context_messages": "prompt"},
    ),
    FormatExample(
        "prompts in a template (OpenRLHF's `input_template`), with facts for rewards",
        "prompt",
        [{"prompt": "6 · 7", "solution": 42}],
        [{"prompt": [user("Question: 6 · 7\nAnswer:")], "facts": {"solution": 42}}],
        options={"input_template": "Question: {}\nAnswer:"},
        facts=("solution",),
    ),
    FormatExample(
        "conversations that wait for a reply, as prompts",
        "prompt",
        [
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                    {"from": "human", "value": "Tea?"},
                ]
            }
        ],
        [{"prompt": [user("Hi"), bot("Hello"), user("Tea?")]}],
        columns={"conversations": "prompt"},
    ),
    FormatExample(
        "a transcript as the prompt",
        "prompt",
        [{"prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Tea?\n\nAssistant:"}],
        [{"prompt": [user("Hi"), bot("Hello"), user("Tea?")]}],
    ),
]
SINGLE_REPLIES = [
    FormatExample(
        "prompt and completion (TRL), texts",
        "prompt_completion",
        [{"prompt": "Tea?", "completion": "Yes."}],
        [{"messages": [user("Tea?"), bot("Yes.")]}],
    ),
    FormatExample(
        "prompt and completion (TRL), messages",
        "prompt_completion",
        [{"prompt": [user("Tea?")], "completion": [bot("Yes.")]}],
        [{"messages": [user("Tea?"), bot("Yes.")]}],
    ),
    FormatExample(
        "Alpaca, with a system message and earlier turns",
        "alpaca",
        [
            {
                "instruction": "Translate.",
                "input": "tea",
                "output": "thé",
                "system": "Be brief.",
                "history": [["Hi", "Hello"]],
            }
        ],
        [{"messages": [system("Be brief."), user("Hi"), bot("Hello"), user("Translate.\n\ntea"), bot("thé")]}],
    ),
    FormatExample(
        "instruction, context and response (Dolly)",
        "alpaca",
        [{"instruction": "Which?", "context": "Tea or coffee.", "response": "Tea."}],
        [{"messages": [user("Which?\n\nTea or coffee."), bot("Tea.")]}],
        columns={"context": "input", "response": "output"},
    ),
    FormatExample(
        "question and answer, the answer also as a fact (GSM8K)",
        "question_answer",
        [{"question": "6 · 7?", "answer": "#### 42"}],
        [{"messages": [user("6 · 7?"), bot("#### 42")], "facts": {"answer": "#### 42"}}],
        facts=("answer",),
    ),
    FormatExample(
        "question and answer with a context",
        "question_answer",
        [{"context": "Tea is hot.", "question": "Is it?", "answer": "Yes."}],
        [{"messages": [user("Tea is hot.\n\nIs it?"), bot("Yes.")]}],
    ),
    FormatExample(
        "messages (OpenAI, TRL): content parts, the developer role, a weight",
        "messages",
        [
            {
                "messages": [
                    {"role": "developer", "content": "Be brief."},
                    user([{"type": "text", "text": "Te"}, {"type": "text", "text": "a?"}]),
                    bot("Well.", weight=0),
                    user("So?"),
                    bot("Yes.", weight=1),
                ]
            }
        ],
        [
            {
                "messages": [
                    system("Be brief."),
                    user("Tea?"),
                    bot("Well.", weight=0),
                    user("So?"),
                    bot("Yes.", weight=1),
                ]
            }
        ],
    ),
    FormatExample(
        "messages with tools (OpenAI): arguments as JSON text become objects",
        "messages",
        [
            {
                "messages": [
                    user("Rain?"),
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {
                                "id": "c1",
                                "type": "function",
                                "function": {"name": "weather", "arguments": '{"city": "Bonn"}'},
                            }
                        ],
                    },
                    {"role": "tool", "tool_call_id": "c1", "content": "dry"},
                    bot("No."),
                ],
                "tools": [TOOL],
            }
        ],
        [
            {
                "messages": [
                    user("Rain?"),
                    bot("", tool_calls=[CALL | {"id": "c1"}]),
                    {"role": "tool", "content": "dry", "tool_call_id": "c1"},
                    bot("No."),
                ],
                "tools": [TOOL],
            }
        ],
    ),
    FormatExample(
        "messages with a reasoning field, and arguments of the template (TRL)",
        "messages",
        [
            {
                "messages": [user("Tea?"), bot("Yes.", reasoning_content="Why not?")],
                "chat_template_kwargs": {"enable_thinking": True},
            }
        ],
        [
            {
                "messages": [user("Tea?"), bot("Yes.", reasoning_content="Why not?")],
                "template_arguments": {"enable_thinking": True},
            }
        ],
    ),
    FormatExample(
        "messages in a cell of a table, as Python prints them",
        "messages",
        [{"messages": "[{'role': 'user', 'content': 'Tea?'}, {'role': 'assistant', 'content': \"It's hot.\"}]"}],
        [{"messages": [user("Tea?"), bot("It's hot.")]}],
    ),
    FormatExample(
        "ShareGPT with tools; a first turn of the assistant and a last one of the user are cut",
        "sharegpt",
        [
            {
                "conversations": [
                    {"from": "gpt", "value": "Hello!"},
                    {"from": "human", "value": "Rain?"},
                    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bonn"}}'},
                    {"from": "observation", "value": "dry"},
                    {"from": "gpt", "value": "No."},
                    {"from": "human", "value": "Thanks"},
                ],
                "system": "Be brief.",
                "tools": '[{"name": "weather", "description": "Today\'s weather", '
                '"parameters": {"type": "object", "properties": {}}}]',
            }
        ],
        [
            {
                "messages": [
                    system("Be brief."),
                    user("Rain?"),
                    bot("", tool_calls=[CALL]),
                    {"role": "tool", "content": "dry"},
                    bot("No."),
                ],
                "tools": [TOOL],
            }
        ],
        counts={"cut/first_assistant_turn": 1, "cut/last_user_turn": 1},
    ),
]
UNPAIRED = [
    FormatExample(
        "a reply and whether it is good (TRL's unpaired preference)",
        "prompt_completion",
        [{"prompt": "Tea?", "completion": "No!", "label": False}],
        [labelled("Tea?", "No!", False)],
    ),
    FormatExample(
        "a conversation and whether its reply is good (KTO), under another name",
        "messages",
        [{"messages": [user("Tea?"), bot("Yes.")], "kto_tag": "true"}],
        [labelled("Tea?", "Yes.", True)],
        columns={"kto_tag": "label"},
    ),
    FormatExample(
        "replies with a rating: good from 4, bad below 2",
        "prompt_completion",
        [
            {"prompt": "Tea?", "response": "Yes.", "helpfulness": 4},
            {"prompt": "Tea?", "response": "No!", "helpfulness": 1},
        ],
        [labelled("Tea?", "Yes.", True, score=4.0), labelled("Tea?", "No!", False, score=1.0)],
        options={"threshold": {"score": "helpfulness", "good_from": 4.0, "bad_below": 2.0}},
        columns={"response": "completion"},
    ),
]
PAIRS = [
    FormatExample(
        "HH transcripts",
        "hh",
        [{"chosen": "\n\nHuman: Tea?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Tea?\n\nAssistant: No!"}],
        [pair("Tea?", "Yes.", "No!")],
    ),
    FormatExample(
        "an explicit prompt (TRL), and a margin",
        "preference",
        [{"prompt": "Tea?", "chosen": "Yes.", "rejected": "No!", "margin": 0.5}],
        [pair("Tea?", "Yes.", "No!", margin=0.5)],
    ),
    FormatExample(
        "an explicit prompt that is a transcript",
        "preference",
        [{"prompt": "\n\nHuman: Tea?\n\nAssistant:", "chosen": " Yes.", "rejected": " No!"}],
        [pair("Tea?", "Yes.", "No!")],
    ),
    FormatExample(
        "an implicit prompt (TRL), conversations",
        "preference_implicit",
        [{"chosen": [user("Tea?"), bot("Yes.")], "rejected": [user("Tea?"), bot("No!")]}],
        [pair("Tea?", "Yes.", "No!")],
    ),
    FormatExample(
        "an implicit prompt (TRL), texts that begin alike",
        "preference_implicit",
        [{"chosen": "The sky is blue.", "rejected": "The sky is green."}],
        [pair("The sky is", "blue.", "green.")],
    ),
    FormatExample(
        "Alpaca with a pair",
        "alpaca_preference",
        [{"instruction": "Translate.", "input": "tea", "chosen": "thé", "rejected": "eau"}],
        [pair("Translate.\n\ntea", "thé", "eau")],
    ),
    FormatExample(
        "a question and a pair, with a system message (Orca)",
        "question_preference",
        [{"system": "Be brief.", "question": "Tea?", "chosen": "Yes.", "rejected": "No!"}],
        [{"prompt": [system("Be brief."), user("Tea?")], "chosen": [bot("Yes.")], "rejected": [bot("No!")]}],
    ),
    FormatExample(
        "messages and replies that are texts",
        "messages_preference",
        [{"messages": [user("Tea?")], "chosen": "Yes.", "rejected": "No!"}],
        [pair("Tea?", "Yes.", "No!")],
    ),
    FormatExample(
        "ShareGPT with a pair (LLaMA-Factory)",
        "sharegpt_preference",
        [
            {
                "conversations": [{"from": "human", "value": "Tea?"}],
                "chosen": {"from": "gpt", "value": "Yes."},
                "rejected": {"from": "gpt", "value": "No!"},
            }
        ],
        [pair("Tea?", "Yes.", "No!")],
    ),
    FormatExample(
        "OpenAI's preference files",
        "openai_preference",
        [
            {
                "input": {"messages": [user("Tea?")], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [bot("Yes.")],
                "non_preferred_output": [bot("No!")],
            }
        ],
        [pair("Tea?", "Yes.", "No!")],
    ),
]
WINNERS = [
    FormatExample(
        "two responses and the index of the better one, from 0 (PKU-SafeRLHF)",
        "comparison",
        [{"prompt": "Tea?", "response_0": "No!", "response_1": "Yes.", "better_response_id": 1}],
        [pair("Tea?", "Yes.", "No!")],
        options={
            "comparison": {
                "type": "winner",
                "responses": ["response_0", "response_1"],
                "winner": ["better_response_id"],
                "first": [0],
                "second": [1],
            }
        },
    ),
    FormatExample(
        "by index from 1, 0 for a tie that is kept: a pair in each order",
        "comparison",
        [{"prompt": "Tea?", "output_1": "Yes.", "output_2": "Sure.", "preference": 0}],
        [pair("Tea?", "Yes.", "Sure.", margin=0.0), pair("Tea?", "Sure.", "Yes.", margin=0.0)],
        options={
            "comparison": {
                "type": "winner",
                "responses": ["output_1", "output_2"],
                "winner": ["preference"],
                "first": [1],
                "second": [2],
                "tie": [0],
                "ties": "keep",
                "margin": "gap",
            }
        },
        counts={"pairs_kept/tie": 2},
    ),
    FormatExample(
        "by the name of a column, whole conversations (LMSYS Arena)",
        "comparison",
        [
            {
                "conversation_a": [user("Tea?"), bot("Yes.")],
                "conversation_b": [user("Tea?"), bot("No!")],
                "winner": "model_a",
            }
        ],
        [pair("Tea?", "Yes.", "No!")],
        options={
            "comparison": {
                "type": "winner",
                "responses": ["conversation_a", "conversation_b"],
                "winner": ["winner"],
                "first": ["model_a"],
                "second": ["model_b"],
                "tie": ["tie", "tie (bothbad)"],
            }
        },
    ),
    FormatExample(
        "by the names of the models, which stand in the row",
        "comparison",
        [{"prompt": "Tea?", "a": "No!", "b": "Yes.", "model_a": "m1", "model_b": "m2", "winner": "m2"}],
        [pair("Tea?", "Yes.", "No!")],
        options={
            "comparison": {
                "type": "winner",
                "responses": ["a", "b"],
                "winner": ["winner"],
                "first": [],
                "second": [],
                "names": ["model_a", "model_b"],
            }
        },
    ),
    FormatExample(
        "a list of two, and the letter of the better one",
        "comparison",
        [{"prompt": "Tea?", "answers": ["No!", "Yes."], "choice": "B"}],
        [pair("Tea?", "Yes.", "No!")],
        options={
            "comparison": {
                "type": "winner",
                "responses": ["answers"],
                "winner": ["choice"],
                "first": ["A"],
                "second": ["B"],
            }
        },
    ),
    FormatExample(
        "votes of several annotators: the majority, its lead as margin",
        "comparison",
        [{"prompt": "Tea?", "a": "Yes.", "b": "No!", "anna": "A", "ben": "B", "cleo": "A", "dora": "tie"}],
        [pair("Tea?", "Yes.", "No!", margin=1.0)],
        options={
            "comparison": {
                "type": "winner",
                "responses": ["a", "b"],
                "winner": ["anna", "ben", "cleo", "dora"],
                "first": ["A"],
                "second": ["B"],
                "tie": ["tie"],
                "margin": "gap",
            }
        },
    ),
]
SEVERAL_RESPONSES = [
    FormatExample(
        "responses with scores (UltraFeedback): all pairs, the gap as margin, a least gap",
        "comparison",
        [
            {
                "instruction": "Tea?",
                "completions": [
                    {"response": "No!", "overall_score": 1.0},
                    {"response": "Yes.", "overall_score": 9.0},
                    {"response": "Sure.", "overall_score": 8.5},
                ],
            }
        ],
        [pair("Tea?", "Yes.", "No!", margin=8.0), pair("Tea?", "Sure.", "No!", margin=7.5)],
        options={
            "comparison": {
                "type": "scores",
                "responses": ["completions"],
                "text_key": "response",
                "scores": [],
                "score_key": "overall_score",
                "least_gap": 1.0,
                "margin": "gap",
            }
        },
        counts={"pairs_left_out/small_gap": 1},
    ),
    FormatExample(
        "responses with scores: best against worst",
        "comparison",
        [{"prompt": "Tea?", "responses": ["No!", "Yes.", "Maybe."], "scores": [1, 9, 5]}],
        [pair("Tea?", "Yes.", "No!")],
        options={"comparison": {"type": "scores", "pairs": "best_against_worst"}},
    ),
    FormatExample(
        "responses in columns with a score each, a prompt within an object (WebGPT); a tie gives no pair",
        "comparison",
        [
            {"question": {"text": "Tea?"}, "answer_0": "No!", "answer_1": "Yes.", "score_0": -1.0, "score_1": 1.0},
            {"question": {"text": "Tea?"}, "answer_0": "No!", "answer_1": "Yes.", "score_0": 0.0, "score_1": 0.0},
        ],
        [pair("Tea?", "Yes.", "No!")],
        options={
            "comparison": {"type": "scores", "responses": ["answer_0", "answer_1"], "scores": ["score_0", "score_1"]}
        },
        columns={"question.text": "prompt"},
        counts={"pairs_left_out/tie": 1, "dropped/tie": 1},
    ),
    FormatExample(
        "responses with ranks, 1 the best (Nectar)",
        "comparison",
        [{"prompt": "Tea?", "answers": [{"answer": "No!", "rank": 2.0}, {"answer": "Yes.", "rank": 1.0}]}],
        [pair("Tea?", "Yes.", "No!")],
        options={
            "comparison": {
                "type": "scores",
                "responses": ["answers"],
                "text_key": "answer",
                "scores": [],
                "score_key": "rank",
                "best": "lowest",
            }
        },
    ),
    FormatExample(
        "answers with votes (Stack Exchange)",
        "comparison",
        [{"question": "Tea?", "answers": [{"text": "No!", "votes": 2}, {"text": "Yes.", "votes": 31}]}],
        [pair("Tea?", "Yes.", "No!")],
        options={
            "comparison": {
                "type": "scores",
                "responses": ["answers"],
                "text_key": "text",
                "scores": [],
                "score_key": "votes",
            }
        },
    ),
    FormatExample(
        "responses in ranked order",
        "comparison",
        [{"prompt": "Tea?", "responses": ["Yes.", "Maybe.", "No!"]}],
        [pair("Tea?", "Yes.", "Maybe."), pair("Tea?", "Yes.", "No!"), pair("Tea?", "Maybe.", "No!")],
        options={"comparison": {"type": "order"}},
    ),
    FormatExample(
        "responses with scores, each good or bad by a threshold",
        "comparison",
        [{"prompt": "Tea?", "responses": ["No!", "Yes.", "Maybe."], "scores": [1, 9, 5]}],
        [labelled("Tea?", "No!", False, score=1.0), labelled("Tea?", "Yes.", True, score=9.0)],
        options={
            "comparison": {"type": "scores"},
            "threshold": {"score": None, "good_from": 7.0, "bad_below": 3.0},
        },
        counts={"responses_left_out/between_thresholds": 1},
    ),
]
ANSWER = {"message_id": "2", "parent_id": "1", "role": "assistant", "rank": 1, "text": "No!"}
BETTER = {"message_id": "3", "parent_id": "1", "role": "assistant", "rank": 0, "text": "Yes."}
ROOT = {"message_id": "1", "parent_id": None, "role": "prompter", "rank": None, "text": "Tea?", "labels": {"spam": 0}}
TREES = [
    FormatExample(
        "a tree of messages with ranked replies (OpenAssistant)",
        "comparison",
        [{"message_tree_id": "1", "prompt": {"role": "prompter", "text": "Tea?", "replies": [ANSWER, BETTER]}}],
        [pair("Tea?", "Yes.", "No!")],
        options={"comparison": {"type": "tree"}},
    ),
    FormatExample(
        "the same as a flat file, a message a row",
        "comparison",
        [ROOT, ANSWER, BETTER],
        [pair("Tea?", "Yes.", "No!")],
        options={"comparison": {"type": "tree", "root": None, "id_key": "message_id", "parent_key": "parent_id"}},
    ),
]
EXAMPLES = {
    "Texts and prompts": TEXTS_AND_PROMPTS,
    "Single replies": SINGLE_REPLIES,
    "Replies with a label": UNPAIRED,
    "Pairs": PAIRS,
    "Two responses and which is better": WINNERS,
    "Several responses": SEVERAL_RESPONSES,
    "Trees": TREES,
}
