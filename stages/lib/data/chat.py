"""From messages to token ids and back: rendering by the model's chat template, encoding, decoding.

Prompt and reply are rendered to text, encoded apart and joined as ids, so the boundary between them is known in ids and
no token spans it: a prompt has the same ids in training and in generation. A reply ends in exactly one EOS. Ids are
decoded back and compared with the text; a row that does not come back is unusable.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stages.lib.command.errors import StageError
from stages.lib.data.conversations import Message, UnusableRowError
from stages.lib.data.template_process import RenderingError, template_process
from stages.lib.models.loading_errors import not_loaded
from stages.lib.models.model_facts import TOKENIZER_JSON, require_json_objects

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKEN_IN_TEXT = "special_token_in_text"
NOT_REVERSIBLE = "not_reversible"
TEMPLATE_REFUSES = "template_refuses"
REPLY_CHANGED = "reply_changed"
PROMPT_CHANGED = "prompt_changed"
PROMPT_NOT_A_BEGINNING = "prompt_not_a_beginning"
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


def render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """The text of a conversation.

    Raises:
        RefusedRowError: the chat template raises an error for it, or writes half a surrogate pair.
        StageError: rendering it takes more time or memory than a chat template may take.
    """
    try:
        text = template_process().render(*_template_of(tokenizer), (messages, add_generation_prompt))
        text.encode()
    except UnicodeEncodeError:
        raise RefusedRowError(TEMPLATE_REFUSES, "the chat template writes half a surrogate pair") from None
    except RenderingError as error:
        dated = "; tokens would be others tomorrow, so write a fixed one" if "date_of_today" in str(error) else ""
        raise RefusedRowError(TEMPLATE_REFUSES, f"the chat template refuses these messages: {error}{dated}") from None
    return text


def render_ahead(
    tokenizer: "PreTrainedTokenizerBase", rows: Iterable[tuple[Sequence[Message], Sequence[Message]]]
) -> None:
    """Render what encoding these rows (a prompt and its replies) will ask for, in one go; errors are kept for then."""
    conversations = []
    for prompt, replies in rows:
        conversations.append((prompt, True))
        conversations += [([*prompt, reply], False) for reply in replies]
    template_process().render_ahead(*_template_of(tokenizer), conversations)


def _template_of(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, dict[str, str]]:
    """The template, and the variables that transformers gives it beside the messages."""
    template = tokenizer.chat_template
    assert isinstance(template, str), "load_tokenizer refuses anything else"
    return (WITHOUT_DATE if "strftime_now" in template else "") + template, tokenizer.special_tokens_map


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """Ids of a prompt, up to where a reply starts.

    Raises:
        UnusableRowError: a message holds the text of a special token, or the ids do not decode to the text.
        RefusedRowError: the chat template refuses the messages, gives no text, or leaves out what the user or the
            system says.
        StageError: as `render`.
    """
    _refuse_special_tokens(tokenizer, messages)
    text = render(tokenizer, messages, add_generation_prompt=True)
    if not text:
        raise RefusedRowError(TEMPLATE_REFUSES, "the chat template gives no text for these messages")
    for message in messages:  # of the assistant's earlier turns, templates may leave out the reasoning
        if message["role"] != "assistant" and message["content"].strip() not in text:
            raise RefusedRowError(
                PROMPT_CHANGED,
                f"the chat template leaves out a message of the {message['role']} or changes it: "
                f"{_end_of(message['content'])} gives {_end_of(text)}",
            )
    return _encode(tokenizer, text)


def encode_completion(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[Message], reply: Message) -> list[int]:
    """Ids of a reply to `prompt`, to be put after `encode_prompt(tokenizer, prompt)`; the last is the only EOS.

    Raises:
        UnusableRowError: the reply holds the text of a special token, or the ids do not decode to the text.
        RefusedRowError: the chat template refuses the messages, does not render the prompt as a beginning of the whole,
            or leaves out the reply.
        StageError: as `render`.
    """
    _refuse_special_tokens(tokenizer, [*prompt, reply])
    ids = _encode(tokenizer, render_reply(tokenizer, prompt, reply))
    if tokenizer.eos_token_id in ids:
        raise UnusableRowError(SPECIAL_TOKEN_IN_TEXT)
    return [*ids, tokenizer.eos_token_id]


def render_reply(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[Message], reply: Message) -> str:
    """What the chat template adds to a rendered prompt for its reply, up to the first EOS and without it.

    Where the template writes no EOS, white space that it puts between turns is left out, since EOS takes its place.
    Raises as `encode_completion`.
    """
    start = render(tokenizer, prompt, add_generation_prompt=True)
    whole = render(tokenizer, [*prompt, reply], add_generation_prompt=False)
    if not whole.startswith(start):
        raise RefusedRowError(
            PROMPT_NOT_A_BEGINNING,
            "the chat template does not render a prompt as a beginning of the whole conversation, so a reply cannot be "
            f"told apart: the prompt gives {_end_of(start)}, the whole {_end_of(whole)}; use another template "
            "(prepare_base.chat_template)",
        )
    text, eos, _ = whole[len(start) :].partition(tokenizer.eos_token)
    content = reply["content"]
    if not eos:
        text = content if text.rstrip() == content.rstrip() and text.startswith(content) else text.rstrip()
    if content.strip() not in text:
        raise RefusedRowError(
            REPLY_CHANGED,
            f"the chat template leaves out a reply or changes it: {_end_of(content)} gives {_end_of(text)}",
        )
    return text


def decode_completion(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The text of a reply: ids up to the first EOS, without EOS and padding; other special tokens stay visible."""
    ids = list(ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return _decode(tokenizer, [token_id for token_id in ids if token_id != tokenizer.pad_token_id])


class SpecialTokens(NamedTuple):
    """The special tokens of a tokenizer: text by id, and the pattern of text that an added token swallows."""

    text_of: dict[int, str]
    swallowed: re.Pattern[str] | None


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> SpecialTokens:
    """The tokens that stand for no text. Tokens that are added but not special, such as `<think>`, are text."""
    return _special_tokens(tokenizer, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: "PreTrainedTokenizerBase", *_changes: int | None) -> SpecialTokens:
    added = {token_id: token for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    text_of = {token_id: token.content for token_id, token in added.items()}
    text_of |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    # An added token may swallow the white space beside it (Phi-3's markers do), which then cannot come back.
    sides = [rf"\s+(?={re.escape(token.content)})" for token in added.values() if token.lstrip]
    sides += [rf"(?<={re.escape(token.content)})\s+" for token in added.values() if token.rstrip]
    return SpecialTokens(text_of, re.compile("|".join(sides)) if sides else None)


def _refuse_special_tokens(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> None:
    """A special token spelled in a text would become the token itself: a forged turn, or an end in mid-reply."""
    specials = special_tokens(tokenizer).text_of.values()
    for message in messages:
        if any(text in message["content"] for text in specials):
            raise UnusableRowError(SPECIAL_TOKEN_IN_TEXT)


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Encode text, and check that the ids decode to it but for white space beside tokens and Unicode composition."""
    # The backend alone: the wrapper's bookkeeping takes twice as long as the encoding of a short text.
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    swallowed = special_tokens(tokenizer).swallowed
    expected = swallowed.sub("", text) if swallowed else text
    if _decode(tokenizer, ids) not in (expected, unicodedata.normalize("NFC", expected)):
        raise UnusableRowError(NOT_REVERSIBLE)
    return ids


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """Decode piece by piece between special tokens.

    SentencePiece-like tokenizers put a space before each piece as they encode it and take one away as they decode, but
    only from the beginning of all; by pieces the two are inverse.
    """
    return "".join(_pieces(tokenizer, ids))


def _pieces(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> Iterator[str]:
    text_of = special_tokens(tokenizer).text_of
    for is_special, piece in groupby(ids, key=text_of.__contains__):
        if is_special:
            yield "".join(text_of[token_id] for token_id in piece)
        else:
            # The backend alone, since the wrapper may "clean up" spaces before punctuation.
            yield tokenizer.backend_tokenizer.decode(list(piece), skip_special_tokens=False)


def _end_of(text: str) -> str:
    return repr(text if len(text) <= 60 else f"…{text[-60:]}")
