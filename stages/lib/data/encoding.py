"""From text to token ids and back, with the check that the two are inverse.

Texts are encoded many at a time, each by itself, and joined as ids: so a boundary between two texts is known in ids,
and no token spans it.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.lib.data.conversations import Message
from stages.lib.data.row_errors import UnusableRowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKEN_IN_TEXT = "special_token_in_text"
NOT_REVERSIBLE = "not_reversible"


class SpecialTokens(NamedTuple):
    """The special tokens of a tokenizer: text by id, and the pattern of text that an added token swallows."""

    eos: str
    eos_id: int
    text_of: dict[int, str]
    first_letters: tuple[str, ...]
    swallowed: re.Pattern[str] | None
    bos_ids: tuple[int, ...]  # what the tokenizer puts before plain text: its BOS, or nothing


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
    first_letters = tuple(sorted({text[:1] for text in text_of.values()}))
    return SpecialTokens(
        str(tokenizer.eos_token),
        tokenizer.eos_token_id,
        text_of,
        first_letters,
        re.compile("|".join(sides)) if sides else None,
        _bos_ids(tokenizer),
    )


def _bos_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    bos_id = tokenizer.bos_token_id
    return (bos_id,) if bos_id is not None and tokenizer("a")["input_ids"][:1] == [bos_id] else ()


def refuse_special_tokens(specials: SpecialTokens, texts: Iterable[str]) -> None:
    """Raise UnusableRowError for a special token spelled in a text: it would become the token itself.

    That would be a forged turn, or an end in mid-reply.
    """
    for text in texts:
        for letter in specials.first_letters:  # none is in most texts, and there may be hundreds of special tokens
            if letter in text and any(special in text for special in specials.text_of.values()):
                raise UnusableRowError(SPECIAL_TOKEN_IN_TEXT)


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value, the keys of its objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)


def texts_of(messages: Iterable[Message]) -> Iterator[str]:
    """The texts of messages: contents, and whatever else a template may write of them."""
    for message in messages:
        if len(message) == 2:  # role and content, as nearly all are
            yield message["content"]
        else:
            yield from texts_in([value for key, value in message.items() if key != "role"])


def encode_texts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int] | None]:
    """The ids of each text, encoded by itself without BOS or EOS; None for one that its ids do not decode to.

    White space beside tokens that swallow it, and Unicode composition, may differ.
    """
    # The backend alone: the wrapper's bookkeeping takes twice as long as the encoding of a short text.
    backend = tokenizer.backend_tokenizer
    encoded = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    decoded = backend.decode_batch(encoded, skip_special_tokens=False)
    return [
        ids if whole == text or _comes_back(tokenizer, text, ids) else None
        for text, ids, whole in zip(texts, encoded, decoded, strict=True)
    ]


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The ids of one text. Raises UnusableRowError if they do not decode to it."""
    (ids,) = encode_texts(tokenizer, [text])
    if ids is None:
        raise UnusableRowError(NOT_REVERSIBLE)
    return ids


def _comes_back(tokenizer: "PreTrainedTokenizerBase", text: str, ids: list[int]) -> bool:
    swallowed = special_tokens(tokenizer).swallowed
    expected = swallowed.sub("", text) if swallowed else text
    return decode(tokenizer, ids) in (expected, unicodedata.normalize("NFC", expected))


def decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
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
