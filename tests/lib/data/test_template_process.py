"""Chat templates as strangers write them: each ends in a text or in one error, within its time and memory."""

import os
import signal
import time

import pytest

from stages.lib.command.errors import StageError
from stages.lib.data import template_process
from stages.lib.data.template_process import Rendered, RenderingError, TemplateProcess, ToRender

USER = [{"role": "user", "content": "hä\ud83c\n"}]
VARIABLES = {"bos_token": "<s>"}
ECHO = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ add_generation_prompt }}"


@pytest.fixture(scope="module")
def process():
    return TemplateProcess()


def test_a_text_comes_back_as_the_template_writes_it(process):
    assert process.render(ECHO, VARIABLES, ToRender(USER, True)) == Rendered("<s>hä\ud83c\nTrue", [])
    assert process.render(ECHO, {}, ToRender(USER, False)).text == "hä\ud83c\nFalse"


def test_a_template_gets_tools_and_the_arguments_of_a_row(process):
    template = "{{ tools | tojson }}{{ thinking }}{{ messages[0].tool_calls }}{{ tools is none }}"
    tools = [{"type": "function", "function": {"name": "add"}}]
    message = {"role": "assistant", "content": "", "tool_calls": [1]}
    asked = ToRender([message], False, tools, {"thinking": True})
    assert process.render(template, {}, asked).text == (
        '[{"type": "function", "function": {"name": "add"}}]True[1]False'
    )
    assert process.render(template, {}, ToRender([message], False)).text == "null[1]True"
    with pytest.raises(RenderingError, match="multiple values for keyword argument 'bos_token'"):
        process.render(template, {"bos_token": "<s>"}, ToRender([message], False, None, {"bos_token": "x"}))


def test_places_of_what_the_assistant_writes(process):
    template = (
        "{% for m in messages %}{{ m.role[0] }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}."
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    messages = [{"role": role, "content": role * 2} for role in ("user", "assistant", "user", "assistant")]
    text, spans = process.render(template, {}, ToRender(messages, False, spans=True))
    assert [text[start:end] for start, end in spans] == ["assistantassistant."] * 2
    assert process.render(template, {}, ToRender(messages, False)).spans == []


def test_what_has_no_address_is_printed_as_jinja_prints_it(process):
    template = "{{ none }} {{ 1.5 }} {{ range(2) }} {{ [1, 'a'] }} {{ 'abc' | batch(2) | list }} {{ not_there }}"
    said = "<x at 0x7f>"  # by a user
    printed = "None 1.5 range(0, 2) [1, 'a'] [['a', 'b'], ['c']] <x at 0x7f>"
    message = [{"role": "user", "content": said}]
    assert process.render(template + "{{ messages[0].content }}", {}, ToRender(message, True)).text == printed


def test_results_of_many_are_those_of_each(process):
    conversations = [ToRender([{"role": "user", "content": str(number)}], number % 2 == 0) for number in range(300)]
    texts = [result.text for result in process.render_all(ECHO, VARIABLES, conversations)]
    assert texts == [f"<s>{number}{number % 2 == 0}" for number in range(300)]
    assert process.render("{{ messages[0].content }}", {}, conversations[7]).text == "7"


def test_a_message_of_several_conversations_is_written_once(process):
    prompt, good, bad = ({"role": "user", "content": text} for text in ("p", "g", "b"))
    equal = dict(prompt)
    asked = [ToRender(messages, False) for messages in ([prompt], [prompt, good], [prompt, bad], [equal, good])]
    assert template_process._request(asked) == {
        "messages": [prompt, good, bad, equal],
        "conversations": [[[0], False], [[0, 1], False], [[0, 2], False], [[3, 1], False]],
    }
    results = process.render_all(ECHO, {}, asked)
    assert [result.text for result in results] == ["pFalse", "pgFalse", "pbFalse", "pgFalse"]


def test_answers_that_nobody_waited_for_are_not_those_of_the_next():
    process = TemplateProcess()
    process.begin(ECHO, {}, [ToRender(USER, True)])
    wait = process.begin(ECHO, {}, [ToRender([{"role": "user", "content": "b"}], False)])
    assert [result.text for result in wait()] == ["bFalse"]
    assert process.process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1/0 }}", "ZeroDivisionError: division by zero"),
        ("{{ 'abc' | random }}", "TemplateAssertionError: No filter named 'random'"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
        ("{{ 'x' + 1 }}", "TypeError: "),
        ("{% include 'x' %}", "TypeError: no loader for this environment specified"),
        ("{{ none | length }}", "TypeError: object of type 'NoneType' has no len()"),
        ("{% for i in range(1000001) %}{% endfor %}", "OverflowError: Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError: "),
        ("{{ raise_exception('no\nsystem') }}", "no system"),
        ("{{ 'abc' | batch(2) }}", "it prints a generator, whose text is another one at every run"),
        ("{{ [raise_exception] }}", "it prints a list, whose text is another one at every run"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% for m in messages %}", "TemplateSyntaxError: Unexpected end of template"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError: "),
        ("{% set _ = messages.append(1) %}", "SecurityError: "),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "RecursionError: "),
    ],
)
def test_what_a_template_raises_is_one_line(process, template, message):
    for _ in range(2):  # and the process goes on
        with pytest.raises(RenderingError) as raised:
            process.render(template, {}, ToRender(USER, True))
        assert str(raised.value).startswith(message)
        assert "\n" not in str(raised.value)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
POWER = "{{ 10 ** (10 ** 9) }}"  # within a C function, where no handler of Python's would be called


@pytest.mark.parametrize("template", [LOOP, POWER])
def test_a_template_without_end_is_stopped(monkeypatch, template):
    monkeypatch.setattr(template_process, "SECONDS", 0.5)
    process = TemplateProcess()
    begun = time.monotonic()
    with pytest.raises(StageError, match=r"^the chat template was stopped: rendering .* took more than 0\.5 s$"):
        process.render(template, {}, ToRender(USER, True))
    assert time.monotonic() - begun < 60
    assert process.process.returncode == -signal.SIGPROF


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'x' * 10000000000 }}", "took more memory than it may have"),
        ("{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}", "more memory"),
        ("{{ 'x' * 2000000 }}", "took 2,000,000 characters, more than a template of such messages should give"),
    ],
)
def test_a_template_that_grows_is_stopped_at_the_first_conversation(template, message):
    process = TemplateProcess()
    other = ToRender([{"role": "user", "content": "b"}], True)
    first, second = process.render_all(template, {}, [ToRender(USER, True), other])
    assert second is first
    assert isinstance(first, StageError)
    assert message in str(first)
    assert process.process.wait() == -signal.SIGKILL


def test_what_came_before_the_end_of_the_process_counts(monkeypatch):
    monkeypatch.setattr(template_process, "SECONDS", 0.5)
    process = TemplateProcess()
    template = "{% if messages[0].content == '3' %}" + LOOP + "{% endif %}{{ messages[0].content }}"
    conversations = [ToRender([{"role": "user", "content": str(number)}], True) for number in range(5)]
    results = process.render_all(template, {}, conversations)
    assert [result.text for result in results[:3]] == ["0", "1", "2"]
    assert [str(result) for result in results[3:]] == [str(results[3])] * 2
    assert "more than 0.5 s" in str(results[3])


def test_a_process_that_is_gone_is_one_message_and_the_next_is_another(monkeypatch):
    first = template_process.template_process()
    assert template_process.template_process() is first
    os.kill(first.process.pid, signal.SIGKILL)
    with pytest.raises(StageError, match="its process was ended by signal 9"):
        first.render(ECHO, {}, ToRender(USER, True))
    second = template_process.template_process()
    assert second is not first
    assert second.render(ECHO, {}, ToRender(USER, False)).text.endswith("False")
    monkeypatch.setattr(os, "getpid", lambda: -1)  # a fork has pipes of its own
    assert template_process.template_process() is not second
