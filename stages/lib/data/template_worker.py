"""Renders chat templates in a process of its own: a template is a stranger's program, and may loop or grow without end.

    template_worker.py SECONDS BYTES

Started by `template_process.py`. It imports nothing of ours and no torch, so it is there in a second. It reads
requests from stdin and answers on stdout, each a line of JSON:

    {"template": …, "variables": {…}}      what is rendered from now on, and with which variables; no answer
    {"messages": […], "conversations": [[places, add_generation_prompt, tools?, template_arguments?, spans?], …]}
        → [text | {"text": …, "spans": …} | {"error": …} | {"excess": …}, …]

`places` says which of the messages a conversation holds; `spans` are the places, as [start, end] in the text, of what
stands in the template's `{% generation %}` blocks.

The kernel ends the process once a rendering takes more than SECONDS of processor time; it gets no more than BYTES of
memory beyond what the libraries take.
"""

import contextlib
import gc
import json
import re
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

TEMPLATE_TEXT = 1_000_000  # characters that a template may add to a conversation,
TIMES_THE_CONVERSATION = 10  # with each character of the messages written so many times
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+>")


def main() -> None:
    import jinja2.sandbox
    from jinja2.defaults import DEFAULT_FILTERS, DEFAULT_NAMESPACE

    # A text must be the same at every run. Each template is compiled in an environment of this class.
    jinja2.sandbox.ImmutableSandboxedEnvironment = partial(  # pyrefly: ignore[bad-assignment]  # called, never subclassed
        jinja2.sandbox.ImmutableSandboxedEnvironment, finalize=without_address
    )
    from transformers.utils.chat_template_utils import render_jinja_template

    del DEFAULT_FILTERS["random"], DEFAULT_NAMESPACE["lipsum"]
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    limit_memory(memory)
    template, variables = "", {}
    gc.freeze()  # what is loaded stays, and need not be looked through at each collection
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if "template" in request:
            template, variables = request["template"], request["variables"]
            continue
        answers = []
        for places, *how in request["conversations"]:
            messages = [request["messages"][place] for place in places]
            signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends a process that does not handle it
            answers.append(answered(render_jinja_template, template, variables, messages, *how))
            signal.setitimer(signal.ITIMER_PROF, 0)
        # All at once: waking the other process takes as long as rendering.
        sys.stdout.buffer.write(f"[{', '.join(answers)}]\n".encode(errors="surrogatepass"))
        sys.stdout.buffer.flush()


def answered(render: Any, template: str, variables: dict[str, Any], *conversation: Any) -> str:
    try:
        return json.dumps(answer_to(render, template, variables, *conversation), ensure_ascii=False)
    except MemoryError:
        return json.dumps({"excess": "more memory than it may have"})


def without_address(value: Any) -> Any:
    """What a template prints, unless it is text with an address in memory, such as that of a generator."""
    from jinja2 import TemplateError

    if value is not None and not isinstance(value, str | int | float) and ADDRESS.search(str(value)):
        raise TemplateError(f"it prints a {type(value).__name__}, whose text is another one at every run")
    return value


def limit_memory(more: int) -> None:
    """Hold this process to the address space that it has now and `more` bytes, where the system can."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def answer_to(
    render: Any,
    template: str,
    variables: dict[str, Any],
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
    tools: list[dict[str, Any]] | None = None,
    template_arguments: dict[str, Any] | None = None,
    spans: bool = False,
) -> str | dict[str, Any]:
    """The answer to a request: a text, or why there is none."""
    try:
        texts, indices = render(
            conversations=[messages],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            return_assistant_tokens_mask=spans,
            **variables,
            **template_arguments or {},
        )
    except MemoryError:
        raise
    except Exception as error:  # whatever the template raises; its author chose what
        reason = " ".join(str(error)[:1000].split())
        name = type(error).__name__
        return {"error": reason if reason and name in ("TemplateError", "UndefinedError") else f"{name}: {reason}"}
    text = texts[0]
    if len(text) > TEMPLATE_TEXT:
        given = len(json.dumps([messages, tools, template_arguments], ensure_ascii=False))
        if len(text) > TEMPLATE_TEXT + TIMES_THE_CONVERSATION * given:
            return {"excess": f"{len(text):,} characters, more than a template of such messages should give"}
    return {"text": text, "spans": indices[0]} if spans else text


if __name__ == "__main__":
    main()
