"""Chat templates as strangers write them: each ends in a text or in one error, within its time and memory."""

import os
import signal
import time

import pytest

from stages.lib.command.errors import StageError
from stages.lib.data import template_process
from stages.lib.data.template_process import RenderingError, TemplateProcess

USER = [{"role": "user", "content": "hä\ud83c\n"}]
VARIABLES = {"bos_token": "<s>"}
ECHO = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ add_generation_prompt }}"


@pytest.fixture(scope="module")
def process():
    return TemplateProcess()


def test_a_text_comes_back_as_the_template_writes_it(process):
    assert process.render(ECHO, VARIABLES, (USER, True)) == "<s>hä\ud83c\nTrue"
    assert process.render(ECHO, {}, (USER, False)) == "hä\ud83c\nFalse"


def test_what_has_no_address_is_printed_as_jinja_prints_it(process):
    template = "{{ none }} {{ 1.5 }} {{ range(2) }} {{ [1, 'a'] }} {{ 'abc' | batch(2) | list }} {{ not_there }}"
    said = "<x at 0x7f>"  # by a user
    printed = "None 1.5 range(0, 2) [1, 'a'] [['a', 'b'], ['c']] <x at 0x7f>"
    message = [{"role": "user", "content": said}]
    assert process.render(template + "{{ messages[0].content }}", {}, (message, True)) == printed


def test_results_of_many_are_those_of_each(process):
    conversations = [([{"role": "user", "content": str(number)}], number % 2 == 0) for number in range(300)]
    process.render_ahead(ECHO, VARIABLES, conversations)
    sent = process.results
    texts = [process.render(ECHO, VARIABLES, conversation) for conversation in conversations]
    assert texts == [f"<s>{number}{number % 2 == 0}" for number in range(300)]
    assert process.results is sent  # nothing was asked for twice
    assert process.render("{{ messages[0].content }}", {}, conversations[7]) == "7"


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
            process.render(template, {}, (USER, True))
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
        process.render(template, {}, (USER, True))
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
    other = ([{"role": "user", "content": "b"}], True)
    process.render_ahead(template, {}, [(USER, True), other])
    assert len(process.results) == 1
    with pytest.raises(StageError, match=message):
        process.render(template, {}, (USER, True))
    assert process.process.wait() == -signal.SIGKILL


def test_what_came_before_the_end_of_the_process_counts(monkeypatch):
    monkeypatch.setattr(template_process, "SECONDS", 0.5)
    process = TemplateProcess()
    template = "{% if messages[0].content == '3' %}" + LOOP + "{% endif %}{{ messages[0].content }}"
    conversations = [([{"role": "user", "content": str(number)}], True) for number in range(5)]
    process.render_ahead(template, {}, conversations)
    assert [process.render(template, {}, conversation) for conversation in conversations[:3]] == ["0", "1", "2"]
    with pytest.raises(StageError, match=r"more than 0\.5 s"):
        process.render(template, {}, conversations[3])


def test_a_process_that_is_gone_is_one_message_and_the_next_is_another(monkeypatch):
    first = template_process.template_process()
    assert template_process.template_process() is first
    os.kill(first.process.pid, signal.SIGKILL)
    with pytest.raises(StageError, match="its process was ended by signal 9"):
        first.render(ECHO, {}, (USER, True))
    second = template_process.template_process()
    assert second is not first
    assert second.render(ECHO, {}, (USER, False)).endswith("False")
    monkeypatch.setattr(os, "getpid", lambda: -1)  # a fork has pipes of its own
    assert template_process.template_process() is not second
