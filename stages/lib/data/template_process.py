"""The process in which chat templates are rendered, within limits of time and memory (see `template_worker.py`)."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.data import template_worker

SECONDS = 10.0  # processor time of one rendering, which takes a fraction of a millisecond
MEMORY = 2**29  # bytes that rendering may take beyond what the loaded libraries have
ConversationToRender = tuple[Sequence[Mapping[str, str]], bool]  # messages, and whether a reply is to follow them


class RenderingError(Exception):
    """What the template raised for a conversation, in its own words."""


class TemplateProcess:
    """Renders conversations by a template. It ends with this process, whatever ends that: its stdin is closed then."""

    def __init__(self) -> None:
        self.settings: tuple[str, Mapping[str, Any]] | None = None
        self.results: dict[Any, str | Exception] = {}  # of the last conversations that were sent
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

    def render(self, template: str, variables: Mapping[str, Any], conversation: ConversationToRender) -> str:
        """The text of a conversation.

        Raises:
            RenderingError: the template raised an error.
            StageError: it took more time or memory than a chat template may take.
        """
        key = _key(conversation)
        if (template, variables) != self.settings or key not in self.results:
            self.render_ahead(template, variables, [conversation])
        result = self.results[key]
        if isinstance(result, Exception):
            raise result
        return result

    def render_ahead(
        self, template: str, variables: Mapping[str, Any], conversations: Sequence[ConversationToRender]
    ) -> None:
        """Render all at once, which saves the two processes most of their waiting; `render` then has the results."""
        lines: list[Any] = [
            [{"messages": messages, "add_generation_prompt": open_} for messages, open_ in conversations]
        ]
        if (template, variables) != self.settings:
            self.settings = (template, variables)
            lines.insert(0, {"template": template, "variables": variables})
        self.results = {}
        with contextlib.suppress(BrokenPipeError):
            self.writer.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            self.writer.flush()
        for conversation in conversations:
            answer = self.reader.readline()
            result = _result(json.loads(answer)) if answer else self._ended()
            self.results[_key(conversation)] = result
            if isinstance(result, StageError):  # it ends the stage: the others need not take their time
                self.process.kill()
                _process_of.cache_clear()
                break

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


def _key(conversation: ConversationToRender) -> Any:
    messages, open_ = conversation
    return tuple((message["role"], message["content"]) for message in messages), open_


def _result(answer: dict[str, str]) -> str | Exception:
    if "error" in answer:
        return RenderingError(answer["error"])
    return _excess(answer["excess"]) if "excess" in answer else answer["text"]


def _excess(what: str) -> StageError:
    return StageError(f"the chat template was stopped: rendering these messages took {what}")


def template_process() -> TemplateProcess:
    """The one of this process; start it early, since it needs a second to load."""
    return _process_of(os.getpid())


@cache
def _process_of(_process_id: int) -> TemplateProcess:  # a fork shares its parent's pipes, and must not use them
    return TemplateProcess()
