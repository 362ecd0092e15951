"""The process in which chat templates are rendered, within limits of time and memory (see `template_worker.py`)."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

from stages.lib.command.errors import StageError
from stages.lib.data import template_worker
from stages.lib.data.conversations import Message

SECONDS = 10.0  # processor time of one rendering, which takes a fraction of a millisecond
MEMORY = 2**29  # bytes that rendering may take beyond what the loaded libraries have


class RenderingError(Exception):
    """What the template raised for a conversation, in its own words."""


class ToRender(NamedTuple):
    """A conversation, and how it is to be rendered."""

    messages: Sequence[Message]
    add_generation_prompt: bool  # a reply is to follow the messages
    tools: list[dict[str, Any]] | None = None
    template_arguments: dict[str, Any] | None = None
    spans: bool = False  # also say where in the text the template's {% generation %} blocks are


NOTHING_MORE = (None, None, False)


class Rendered(NamedTuple):
    """A conversation's text, and the places in it of the template's {% generation %} blocks, if they were asked for."""

    text: str
    spans: list[tuple[int, int]]


RenderingResult = Rendered | RenderingError | StageError


class TemplateProcess:
    """Renders conversations by a template. It ends with this process, whatever ends that: its stdin is closed then."""

    def __init__(self) -> None:
        self.settings: tuple[str, Mapping[str, Any]] | None = None
        self.owes_answers = False
        self.process = subprocess.Popen(
            [sys.executable, "-P", template_worker.__file__, str(SECONDS), str(MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the stage, which then closes the pipe
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.writer, self.reader = self.process.stdin, self.process.stdout

    def render(self, template: str, variables: Mapping[str, Any], conversation: ToRender) -> Rendered:
        """One conversation. Raises what `render_all` returns."""
        (result,) = self.render_all(template, variables, [conversation])
        if isinstance(result, Exception):
            raise result
        return result

    def render_all(
        self, template: str, variables: Mapping[str, Any], conversations: Sequence[ToRender]
    ) -> list[RenderingResult]:
        """Render many at once: the results of `begin`, waited for."""
        return self.begin(template, variables, conversations)()

    def begin(
        self, template: str, variables: Mapping[str, Any], conversations: Sequence[ToRender]
    ) -> Callable[[], list[RenderingResult]]:
        """Begin to render many, while this process does something else. Called again, it drops what was begun before.

        Returns:
            What waits for the results, for each conversation its text; or a RenderingError with what the template
            raised; or a StageError where it took more time or memory than a chat template may take, and for all that
            come after it.
        """
        if self.owes_answers:
            self.process.kill()
            _process_of.cache_clear()
            return template_process().begin(template, variables, conversations)
        self.owes_answers = True
        lines = [_request(conversations)]
        if (template, variables) != self.settings:
            self.settings = (template, variables)
            lines.insert(0, {"template": template, "variables": variables})
        with contextlib.suppress(BrokenPipeError):
            for line in lines:
                self.writer.write(_line(line))
            self.writer.flush()
        return partial(self._results, template, variables, conversations)

    def _results(
        self, template: str, variables: Mapping[str, Any], conversations: Sequence[ToRender]
    ) -> list[RenderingResult]:
        answers = self.reader.readline()
        self.owes_answers = False
        results = [_result(answer) for answer in json.loads(answers)] if answers else [self._ended()]
        stopped = next((number for number, result in enumerate(results) if isinstance(result, StageError)), None)
        if stopped is None:
            return results
        self.process.kill()
        _process_of.cache_clear()
        if not answers and len(conversations) > 1:  # which of them ended it?
            return _one_by_one(template, variables, conversations)
        return results[:stopped] + [results[stopped]] * (len(conversations) - stopped)

    def _ended(self) -> StageError:
        """Why the process has ended without an answer; the next rendering is another one's."""
        _process_of.cache_clear()
        status = self.process.wait()
        if status == -signal.SIGPROF:
            return _excess(f"more than {SECONDS:g} s")
        if status < 0:
            return _excess(f"so much that its process was ended by signal {-status}")
        return StageError(
            f"the process that renders chat templates ended with exit code {status}; "
            f"`python {template_worker.__file__} 10 1000000000` shows why"
        )


def _one_by_one(
    template: str, variables: Mapping[str, Any], conversations: Sequence[ToRender]
) -> list[RenderingResult]:
    results: list[RenderingResult] = []
    for conversation in conversations:
        results += template_process().render_all(template, variables, [conversation])
        if isinstance(results[-1], StageError):
            break
    return results + results[-1:] * (len(conversations) - len(results))


def _request(conversations: Sequence[ToRender]) -> dict[str, Any]:
    """A message that several hold, as a pair's prompt is rendered three times, is written once."""
    messages: list[Message] = []
    place_of: dict[int, int] = {}
    asked = []
    for conversation in conversations:
        places = []
        for message in conversation.messages:
            place = place_of.setdefault(id(message), len(messages))
            if place == len(messages):
                messages.append(message)
            places.append(place)
        more = conversation[2:]
        asked.append([places, conversation.add_generation_prompt, *(() if more == NOTHING_MORE else more)])
    return {"messages": messages, "conversations": asked}


def _line(request: dict[str, Any]) -> bytes:
    return json.dumps(request, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"


def _result(answer: str | dict[str, Any]) -> RenderingResult:
    if isinstance(answer, str):
        return Rendered(answer, [])
    if "error" in answer:
        return RenderingError(answer["error"])
    return _excess(answer["excess"]) if "excess" in answer else Rendered(answer["text"], answer["spans"])


def _excess(what: str) -> StageError:
    return StageError(f"the chat template was stopped: rendering these messages took {what}")


def template_process() -> TemplateProcess:
    """The one of this process; start it early, since it needs a second to load."""
    return _process_of(os.getpid())


@cache
def _process_of(_process_id: int) -> TemplateProcess:  # a fork shares its parent's pipes, and must not use them
    return TemplateProcess()
