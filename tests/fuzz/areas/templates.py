"""Chat templates, as prepare_base and tokenize meet them."""

import random
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.case import Area, Case, Expected, put
from tests.fuzz.mutations import mutated_bytes
from tests.stages.tiny_pipeline import PROJECT

TEMPLATES = "stages/chat_templates"
OURS = (PROJECT / TEMPLATES / "chat.jinja").read_text()
LOOP = "{%- for message in messages %}"
TURN = "{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] }}"
END = "{%- if message['role'] == 'assistant' %}{{- eos_token }}{%- endif %}{%- endfor %}"
PROMPT = "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
SHORT = LOOP + TURN + END + PROMPT
ENDLESS = "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}"
EDGES = "{% set ns = namespace(x='a') %}"
# What it does, and the statement that stands before a sound template.
STATEMENTS: tuple[tuple[str, str], ...] = (
    ("divides by zero", "{{ 1/0 }}"),
    ("adds a number to a text", "{{ 'x' + 1 }}"),
    ("includes another", "{% include 'x' %}"),
    ("imports another", "{% import 'x' as y %}"),
    ("extends another", "{% extends 'x' %}"),
    ("asks for the length of nothing", "{{ none | length }}"),
    ("counts to a million and one", "{% for i in range(1000001) %}{% endfor %}"),
    ("calls a macro without end", ENDLESS),
    ("loops without end", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
    (
        "loops without end and writes",
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
    ),
    ("grows without end", EDGES + "{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"),
    ("multiplies a text", "{{ 'x' * 10000000000 }}"),
    ("raises to a huge power", "{{ 9 ** 9 ** 9 }}"),
    ("shifts far", "{{ (1 * 10) ** 999999 }}"),
    ("fills a text to a huge width", "{{ '%099999999999d' % 5 }}"),
    ("formats to a huge width", "{{ '{:>9999999999}'.format(5) }}"),
    ("refuses in two lines", "{{ raise_exception('one\\nerror: two') }}"),
    ("refuses with nothing", "{{ raise_exception() }}"),
    ("refuses with a control character", "{{ raise_exception('\\x1b[2J') }}"),
    ("refuses with 100,000 characters", "{{ raise_exception('x' * 100000) }}"),
    ("reads what is not there", "{{ no.such.thing }}"),
    ("calls what is not there", "{{ nothing() }}"),
    ("calls a text", "{{ 'x'() }}"),
    ("looks into the interpreter", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    ("looks into the interpreter by format", "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}"),
    ("takes an item of nothing", "{{ messages[99]['content'] }}"),
    ("takes an attribute of a list", "{{ messages.content.x }}"),
    ("uses a filter that is not there", "{{ 'x' | nofilter }}"),
    ("uses a test that is not there", "{% if 'x' is notest %}{% endif %}"),
    ("uses a tag that is not there", "{% nosuch %}"),
    ("does not close a tag", "{% if true %}"),
    ("does not close an expression", "{{ 'x'"),
    ("does not close a comment", "{# x"),
    ("nests 500 loops", "{% for a in [1] %}" * 500 + "{% endfor %}" * 500),
    ("nests 5,000 brackets", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"),
    ("adds 5,000 times", "{{ " + "1+" * 5000 + "1 }}"),
    ("has an integer of 5,000 digits", "{{ " + "9" * 5000 + " }}"),
    ("writes an integer of 5,000 digits", "{{ 10 ** 5000 }}"),
    ("orders what cannot be ordered", "{{ [1, 'a'] | sort }}"),
    ("makes JSON of what cannot be", "{{ {1: namespace} | tojson }}"),
    ("makes a number of a text", "{{ 'x' | int(base=99) }}"),
    ("breaks out of no loop", "{% break %}"),
    ("asks for the date", "{{ strftime_now('%d %B %Y') }}"),
    ("asks for the date in an odd form", "{{ strftime_now('\\ud800') }}"),
    ("changes the messages", "{% set _ = messages.append({'role': 'user', 'content': 'x'}) %}"),
    ("empties the messages", "{% set _ = messages.clear() %}"),
    ("changes a message", "{% set _ = messages[0].update({'content': 5}) %}"),
    ("picks at random", "{{ ['a', 'b'] | random }}"),
    ("makes filler text", "{{ lipsum() }}"),
    ("unpacks too many", "{% for a, b in [1] %}{% endfor %}"),
    ("indexes with a negative step of zero", "{{ messages[::0] }}"),
    ("writes half a surrogate pair", "{{ '\\ud800' }}"),
    ("writes NUL", "{{ '\\x00' }}"),
    ("batches by zero", "{{ [1, 2] | batch(0) | list }}"),
    ("slices by zero", "{{ [1, 2] | slice(0) | list }}"),
    ("rounds a text", "{{ 'a' | round }}"),
    ("indents without end", "{{ 'a\\nb' | indent(9999999999) }}"),
    ("centres without end", "{{ 'a' | center(99999999999) }}"),
    ("wraps by zero", "{{ 'aaa' | wordwrap(0) }}"),
    ("translates", "{% trans %}x{% endtrans %}"),
    ("prints the context", "{{ self }}{{ loop }}"),
    ("calls range with texts", "{{ range('a') }}"),
)
# What it is, the whole template, what must come of it.
WHOLE: tuple[tuple[str, str | bytes, Expected], ...] = (
    ("ours", OURS, "accepted"),
    ("a short sound one", SHORT, "accepted"),
    ("one that trims", SHORT.replace("message['content']", "message['content'] | trim"), "accepted"),
    ("nothing", "", "refused"),
    ("white space", " \n", "refused"),
    ("plain text", "hello", "refused"),
    ("not UTF-8", OURS.encode() + b"{# \xff #}", "refused"),
    ("UTF-16", OURS.encode("utf-16"), "refused"),
    ("with a byte order mark", b"\xef\xbb\xbf" + OURS.encode(), "either"),
    ("bytes of zero", bytes(100), "refused"),
    (
        "one without replies",
        SHORT.replace(TURN, "{% if message['role'] != 'assistant' %}" + TURN + "{% endif %}"),
        "refused",
    ),
    (
        "one without prompts",
        SHORT.replace(TURN, "{% if message['role'] == 'assistant' %}" + TURN + "{% endif %}"),
        "either",
    ),
    ("one that writes messages backwards", SHORT.replace("in messages", "in messages[::-1]"), "refused"),
    ("one that writes in capitals", SHORT.replace("message['content']", "message['content'] | upper"), "refused"),
    ("one without EOS", LOOP + TURN + "{%- endfor %}" + PROMPT, "either"),
    ("one with EOS twice", SHORT.replace("eos_token", "eos_token ~ eos_token"), "either"),
    ("one with EOS before a reply", SHORT.replace("'|>' ~", "'|>' ~ eos_token ~"), "refused"),
    ("one that ignores the generation prompt", LOOP + TURN + END, "either"),
    ("one that adds the generation prompt always", LOOP + TURN + END + "{{- '<|assistant|>' }}", "either"),
    ("one that shows the last message alone", TURN.replace("message[", "messages[-1][") + PROMPT, "refused"),
    (
        "one that refuses a third message",
        "{% if messages | length > 2 %}{{ raise_exception('no') }}{% endif %}" + SHORT,
        "refused",
    ),
    ("one that counts the messages", "{{ messages | length }}" + SHORT, "refused"),
    ("one of 200,000 comments", "{# x #}" * 200_000 + SHORT, "either"),
    ("one with HTML in it", "<script>alert(1)</script>" + SHORT, "either"),
)
FILE = "template.jinja"
SETTINGS = {"prepare_base": {"scratch": {"base": {"chat_template": FILE}}}}
STAGES = ("prepare_base@base", "tokenize_data@sft")


def placed(what: str, prepare: Callable[[Path], object], expected: Expected = "refused", **more: bool) -> Case:
    """A file among the project's own chat templates; the code beside them is linked."""

    def with_templates(folder: Path) -> None:
        code = (folder / "stages").resolve()
        (folder / "stages").unlink()
        for entry in code.iterdir():
            put_link(folder / "stages" / entry.name, entry)
        (folder / TEMPLATES).unlink()
        (folder / TEMPLATES).mkdir()
        prepare(folder / TEMPLATES / FILE)

    return Case(what, with_templates, STAGES, expected, SETTINGS, **more)


def put_link(path: Path, target: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)


def case(what: str, template: str | bytes, expected: Expected = "either") -> Case:
    return placed(what, lambda path: put(path, template), expected)


def late(what: str, template: str | bytes, expected: Expected = "either") -> Case:
    """The template of a base model that was made already."""

    def prepare(folder: Path) -> None:
        put(folder / "models/base/chat_template.jinja", template)

    return Case(f"in models/base: {what}", prepare, ("tokenize_data@preference",), expected)


def role_only(folder: Path) -> None:
    """A template that fails at one row alone: the tenth that it meets."""
    text = SHORT.replace(LOOP, LOOP + "{% if 'again' in message['content'] %}{{ 1/0 }}{% endif %}")
    put(folder / "models/base/chat_template.jinja", text)


NAMED = (
    *(case(f"a template that {what}", text + SHORT) for what, text in STATEMENTS),
    *(late(f"a template that {what}", text + SHORT) for what, text in STATEMENTS),
    *(case(*whole) for whole in WHOLE),
    *(late(*whole) for whole in WHOLE if whole[0] not in ("nothing", "white space")),
    placed("a template that is not there", lambda _: None),
    placed("a template that is a folder", lambda path: path.mkdir()),
    placed("a template that is a dangling link", lambda path: path.symlink_to("nowhere")),
    placed("a template that cannot be read", lambda path: (put(path, OURS), path.chmod(0)), unprivileged=True),
    Case("a template that fails at rows with a word", role_only, ("tokenize_data@sft",), "refused"),
)


def mutated(draw: random.Random) -> Case:
    """A shipped or short template with one thing put in, taken out or damaged."""
    text = draw.choice((OURS, SHORT))
    make = draw.choice((case, late))
    if draw.random() < 0.3:
        what, content = mutated_bytes(text.encode(), draw)
        return make(f"a template that {what}", content)
    what, statement = draw.choice(STATEMENTS)
    places = [
        place for place in range(len(text) + 1) if place in (0, len(text)) or text[place - 2 : place] in ("%}", "}}")
    ]
    place = draw.choice(places)
    return make(f"a template that {what}, at {place} of {len(text)}", text[:place] + statement + text[place:])


AREA = Area(
    needs=("data/prepared", "models/base"),
    named=NAMED,
    mutated=mutated,
    share=0.08,
)
