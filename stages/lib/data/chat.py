"""From messages to the texts that are encoded: rendering by the model's chat template.

Prompt and reply are rendered to text, encoded apart and joined as ids (`stages.lib.data.encoding`), so the boundary
between them is known in ids and no token spans it: a prompt has the same ids in training and in generation. A reply
ends in exactly one EOS.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.lib.command.errors import StageError
from stages.lib.data.conversations import Message
from stages.lib.data.encoding import (
    SPECIAL_TOKEN_IN_TEXT,
    SpecialTokens,
    decode,
    encode_text,
    refuse_special_tokens,
    special_tokens,
    texts_of,
)
from stages.lib.data.row_errors import UnusableRowError
from stages.lib.data.template_process import Rendered, RenderingError, RenderingResult, ToRender, template_process
from stages.lib.models.loading_errors import not_loaded
from stages.lib.models.model_facts import TOKENIZER_JSON, require_json_objects

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_REFUSES = "template_refuses"
REPLY_CHANGED = "reply_changed"
PROMPT_CHANGED = "prompt_changed"
PROMPT_NOT_A_BEGINNING = "prompt_not_a_beginning"
TOOLS_LEFT_OUT = "tools_left_out"
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Many templates write today's date where that is offered, as transformers does, and else one of their own.
WITHOUT_DATE = "{% set strftime_now = date_of_today %}{{ '' }}"  # what follows keeps its first line's end


class RefusedRowError(StageError):
    """The chat template cannot render a row as a prompt and its reply; `reason` is what such rows are counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model folder. Raises StageError if there is none, or it lacks EOS or a chat template.

    Code that a tokenizer brought is not needed: prepare_base has written it as one of transformers' own.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # its length warning would repeat what we check ourselves
    if not folder.is_dir():
        raise StageError(f"{folder} is not a model folder; prepare_base makes one")
    require_json_objects(folder, TOKENIZER_JSON)
    with not_loaded(f"{folder}: the tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer is None:
        raise StageError(f"{folder}: transformers finds no tokenizer in it")
    require_fast(tokenizer, str(folder))
    if tokenizer.eos_token is None:
        raise StageError(f"{folder}: the tokenizer has no EOS token; prepare_base sets one")
    if not isinstance(tokenizer.chat_template, str):
        raise StageError(f"{folder}: the tokenizer has no chat template; prepare_base writes one")
    tokenizer.backend_tokenizer.no_truncation()  # tokenizer.json may hold either
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def require_fast(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Raise a StageError unless a tokenizer is one of the library `tokenizers`, with at least one token."""
    if not hasattr(tokenizer, "backend_tokenizer") or not tokenizer.get_vocab():
        raise StageError(
            f"{name}: the tokenizer ({type(tokenizer).__name__}) has no tokenizer.json that can be used; "
            "use a model with a fast tokenizer"
        )


class Context(NamedTuple):
    """What a chat template gets beside the messages."""

    tools: list[dict[str, Any]] | None = None
    template_arguments: dict[str, Any] | None = None


NO_CONTEXT = Context()


def asked(
    messages: Sequence[Message], context: Context = NO_CONTEXT, *, add_generation_prompt: bool, spans: bool = False
) -> ToRender:
    """A conversation to render."""
    return ToRender(messages, add_generation_prompt, context.tools, context.template_arguments, spans)


def render_all(tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[ToRender]) -> list[RenderingResult]:
    """Render conversations by a tokenizer's template, each to its text or to what `rendered` raises of it."""
    return begin_to_render(tokenizer, conversations)()


def begin_to_render(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[ToRender]
) -> Callable[[], list[RenderingResult]]:
    """What waits for the results of `render_all`. Another call drops those that nobody has waited for."""
    template = tokenizer.chat_template
    assert isinstance(template, str), "load_tokenizer refuses anything else"
    dated = (WITHOUT_DATE if "strftime_now" in template else "") + template
    return template_process().begin(dated, tokenizer.special_tokens_map, conversations)


def rendered(result: RenderingResult) -> Rendered:
    """A conversation's text.

    Raises:
        RefusedRowError: the chat template raises an error for it, or writes half a surrogate pair.
        StageError: rendering it takes more time or memory than a chat template may take.
    """
    if isinstance(result, RenderingError):
        dated = "; tokens would be others tomorrow, so write a fixed one" if "date_of_today" in str(result) else ""
        raise RefusedRowError(TEMPLATE_REFUSES, f"the chat template refuses these messages: {result}{dated}") from None
    if isinstance(result, StageError):
        raise result
    try:
        result.text.encode()
    except UnicodeEncodeError:
        raise RefusedRowError(TEMPLATE_REFUSES, "the chat template writes half a surrogate pair") from None
    return result


def render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """The text of one conversation. Raises as `rendered`."""
    (result,) = render_all(tokenizer, [asked(messages, add_generation_prompt=add_generation_prompt)])
    return rendered(result).text


def text_of_prompt(result: RenderingResult, messages: Sequence[Message]) -> str:
    """The text of a prompt, rendered with what opens a reply.

    Raises:
        RefusedRowError: the chat template refuses the messages, gives no text, or leaves out what is said in them.
        StageError: as `rendered`.
    """
    text = rendered(result).text
    if not text:
        raise RefusedRowError(TEMPLATE_REFUSES, "the chat template gives no text for these messages")
    require_said(messages, text)
    return text


def require_said(messages: Sequence[Message], text: str) -> None:
    """Raise RefusedRowError unless a text holds what others than the assistant say, and the names of called tools.

    Of the assistant's earlier turns templates may leave out the reasoning.
    """
    for message in messages:
        role = message["role"]
        if role != "assistant" and not _says(text, message):
            raise RefusedRowError(
                PROMPT_CHANGED,
                f"the chat template leaves out a message of the {role} or changes it: "
                f"{_end_of(message['content'])} gives {_end_of(text)}",
            )
        if "tool_calls" in message:
            require_names(message["tool_calls"], text, "the calls of tools")


def _says(text: str, message: Message) -> bool:
    content = message["content"].strip()
    # Templates may write what a tool returned as JSON.
    return content in text or (message["role"] == "tool" and json.dumps(content, ensure_ascii=False)[1:-1] in text)


def require_names(tools: Sequence[Mapping[str, Any]], text: str, what: str) -> None:
    """Raise RefusedRowError unless a text holds the name of each tool, or of each tool called."""
    for tool in tools:
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and name not in text:
            raise RefusedRowError(TOOLS_LEFT_OUT, f"the chat template leaves out {what}: {name!r} is not in its text")


def require_tools(tools: Sequence[Mapping[str, Any]], text: str, without_tools: RenderingResult) -> None:
    """Raise RefusedRowError unless a text tells of each tool.

    Args:
        without_tools: the same conversation rendered without them: their names may stand in its messages, too.
    """
    require_names(tools, text, "the tools")
    if isinstance(without_tools, Rendered) and without_tools.text == text:
        raise RefusedRowError(TOOLS_LEFT_OUT, "the chat template leaves out the tools: its text is the same without")


def reasoning_left_out(messages: Sequence[Message], text: str) -> bool:
    """True if a message has reasoning, in a field of its own, that a text does not hold."""
    return any(
        isinstance(reasoning := message.get(field), str) and reasoning.strip() not in text
        for message in messages
        if len(message) > 2
        for field in REASONING_FIELDS
    )


def reply_text(specials: SpecialTokens, start: str, whole: str, reply: Message) -> str:
    """What the chat template adds to a rendered prompt for its reply, up to the first EOS and without it.

    Where the template writes no EOS, white space that it puts between turns is left out, since EOS takes its place.

    Args:
        start: the prompt, rendered with what opens a reply.
        whole: the prompt and the reply, rendered.
    Raises:
        RefusedRowError: `start` is no beginning of `whole`, or the reply is left out or changed.
    """
    if not whole.startswith(start):
        raise RefusedRowError(
            PROMPT_NOT_A_BEGINNING,
            "the chat template does not render a prompt as a beginning of the whole conversation, so a reply cannot be "
            f"told apart: the prompt gives {_end_of(start)}, the whole {_end_of(whole)}; use another template "
            "(prepare_base.chat_template)",
        )
    text, eos, _ = whole[len(start) :].partition(specials.eos)
    content = reply["content"]
    if not eos:
        text = content if text.rstrip() == content.rstrip() and text.startswith(content) else text.rstrip()
    require_reply(reply, text)
    return text


def require_reply(reply: Message, text: str) -> None:
    """Raise RefusedRowError unless a text holds a reply and the names of the tools that it calls."""
    content = reply["content"]
    if content.strip() not in text:
        raise RefusedRowError(
            REPLY_CHANGED,
            f"the chat template leaves out a reply or changes it: {_end_of(content)} gives {_end_of(text)}",
        )
    if "tool_calls" in reply:
        require_names(reply["tool_calls"], text, "the calls of tools")


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """Ids of a prompt, up to where a reply starts.

    Raises:
        UnusableRowError: a message holds the text of a special token, or the ids do not decode to the text.
        RefusedRowError, StageError: as `text_of_prompt`.
    """
    refuse_special_tokens(special_tokens(tokenizer), texts_of(messages))
    (result,) = render_all(tokenizer, [asked(messages, add_generation_prompt=True)])
    return encode_text(tokenizer, text_of_prompt(result, messages))


def encode_completion(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[Message], reply: Message) -> list[int]:
    """Ids of a reply to `prompt`, to be put after `encode_prompt(tokenizer, prompt)`; the last is the only EOS.

    Raises:
        UnusableRowError: the reply holds the text of a special token, or the ids do not decode to the text.
        RefusedRowError: as `rendered` and `reply_text`.
        StageError: as `rendered`.
    """
    specials = special_tokens(tokenizer)
    refuse_special_tokens(specials, texts_of([*prompt, reply]))
    start = asked(prompt, add_generation_prompt=True)
    whole = asked([*prompt, reply], add_generation_prompt=False)
    start_text, whole_text = (rendered(result).text for result in render_all(tokenizer, [start, whole]))
    return with_eos(specials, encode_text(tokenizer, reply_text(specials, start_text, whole_text, reply)))


def with_eos(specials: SpecialTokens, ids: list[int]) -> list[int]:
    """The ids of a reply, with an EOS put at their end. Raises UnusableRowError if one is among them already."""
    if specials.eos_id in ids:
        raise UnusableRowError(SPECIAL_TOKEN_IN_TEXT)
    ids.append(specials.eos_id)
    return ids


def decode_completion(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The text of a reply: ids up to the first EOS, without EOS and padding; other special tokens stay visible."""
    ids = list(ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return decode(tokenizer, [token_id for token_id in ids if token_id != tokenizer.pad_token_id])


def template_marks_replies(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """True if the chat template says by `{% generation %}` what of its text the assistant writes."""
    template = tokenizer.chat_template
    return isinstance(template, str) and GENERATION_BLOCK.search(template) is not None


def _end_of(text: str) -> str:
    return repr(text if len(text) <= 60 else f"…{text[-60:]}")
