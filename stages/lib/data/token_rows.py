"""Prepared rows as rows of token tables: encoded many at a time, held within the budgets of tokens, and counted."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow

from stages.lib.command.errors import StageError
from stages.lib.data.chat import begin_to_render, template_marks_replies, with_eos
from stages.lib.data.conversation_rows import (
    Conversation,
    preference_conversation,
    prompt_conversation,
    sft_conversation,
    unpaired_conversation,
)
from stages.lib.data.conversations import Message
from stages.lib.data.encoding import NOT_REVERSIBLE, SpecialTokens, encode_texts, special_tokens
from stages.lib.data.prepared_rows import Kind
from stages.lib.data.prompts import json_text
from stages.lib.data.row_errors import UnusableRowError
from stages.lib.data.row_texts import Part, RowTexts, recipe, row_texts
from stages.lib.data.template_process import RenderingResult
from stages.lib.data.token_tables import PREFERENCE_SCHEMA, PROMPT_SCHEMA, SFT_SCHEMA, UNPAIRED_SCHEMA
from stages.lib.settings.tokenize_data import LossOn, Tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_TOO_LONG = "prompt_too_long"
REPLY_TOO_LONG = "reply_too_long"
TOO_LONG = "too_long"
EQUAL_REPLIES = "equal_replies"
INVALID_UNICODE = "invalid_unicode"


class Reply(NamedTuple):
    """A reply as ids; of a conversation all that comes after its first prompt."""

    ids: list[int]
    untrained: list[range]  # places in `ids` of what others say in between


class EncodedRow(NamedTuple):
    """A row as ids."""

    prompt: list[int]
    replies: list[Reply]
    reasoning_left_out: bool = False
    prompt_is_cut: bool = False
    reply_is_cut: bool = False
    prompt_messages: int = 0  # how many of the row's messages make the prompt
    bos: int = 0  # how many of the prompt's first ids are BOS before plain text, which no cut takes away
    kept_text: str | None = None  # of a prompt of which not all ids are there: the text of those that are


def encode_rows(
    tokenizer: "PreTrainedTokenizerBase", kind: Kind, rows: Sequence[Conversation], settings: Tokenize
) -> list[EncodedRow | UnusableRowError | StageError]:
    """Each row as ids, or why it cannot be encoded: an UnusableRowError, a RefusedRowError or a StageError."""
    (encoded,) = encode_batches(tokenizer, kind, [rows], settings)
    return encoded


def encode_batches(
    tokenizer: "PreTrainedTokenizerBase", kind: Kind, batches: Iterable[Sequence[Conversation]], settings: Tokenize
) -> Iterator[list[EncodedRow | UnusableRowError | StageError]]:
    """The same for batches of rows, each rendered in one message to the template's process and encoded in one call."""
    specials = special_tokens(tokenizer)  # once, since finding them takes as long as reading a row
    for texts in _rendered_batches(tokenizer, specials, batches, settings.loss_on if kind == "sft" else None):
        wanted = [text for made in texts if not _failed(made) for text in _texts_to_encode(made)]
        ids = iter(encode_texts(tokenizer, wanted))
        yield [
            made if _failed(made) else _or_error(_joined, specials, made, [next(ids) for _ in _texts_to_encode(made)])
            for made in texts
        ]


def _rendered_batches(
    tokenizer: "PreTrainedTokenizerBase",
    specials: SpecialTokens,
    batches: Iterable[Sequence[Conversation]],
    loss_on: LossOn | None,
) -> Iterator[list[Any]]:
    """The texts of each row, or its error. The next batch is read and rendered while one is encoded."""
    recipe_of = partial(recipe, loss_on=loss_on, marks_replies=template_marks_replies(tokenizer))
    texts_of = partial(_rendered_texts, specials, loss_on)
    begun: tuple[list[Any], Callable[[], list[RenderingResult]]] | None = None
    for rows in batches:
        recipes = [_or_error(recipe_of, specials, row) for row in rows]
        texts = None if begun is None else texts_of(*begun)
        asked = [one for made in recipes if not _failed(made) for one in made.asked]
        begun = recipes, begin_to_render(tokenizer, asked)
        if texts is not None:
            yield texts
    if begun is not None:
        yield texts_of(*begun)


def _rendered_texts(
    specials: SpecialTokens, loss_on: LossOn | None, recipes: list[Any], rendered: Callable[[], list[RenderingResult]]
) -> list[Any]:
    results = iter(rendered())
    return [
        made if _failed(made) else _or_error(row_texts, specials, made, [next(results) for _ in made.asked], loss_on)
        for made in recipes
    ]


def _or_error(make: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return make(*arguments)
    except (UnusableRowError, StageError) as error:
        return error


def _failed(made: Any) -> bool:
    return isinstance(made, Exception)


def _texts_to_encode(texts: RowTexts) -> list[str]:
    return [texts.prompt, *(part.text for reply in texts.replies for part in reply)]


def _joined(specials: SpecialTokens, texts: RowTexts, encoded: list[list[int] | None]) -> EncodedRow:
    """The row whose texts have these ids, plain text with the BOS that its tokenizer puts before it.

    Raises UnusableRowError for ids that do not decode to their text.
    """
    prompt, *others = [_reversible(ids) for ids in encoded]
    following = iter(others)
    replies = [_reply(specials, [(part, next(following)) for part in reply]) for reply in texts.replies]
    bos = () if texts.prompt_messages else specials.bos_ids  # of messages the chat template says what begins them
    return EncodedRow(
        [*bos, *prompt], replies, texts.reasoning_left_out, prompt_messages=texts.prompt_messages, bos=len(bos)
    )


def _reversible(ids: list[int] | None) -> list[int]:
    if ids is None:
        raise UnusableRowError(NOT_REVERSIBLE)
    return ids


def _reply(specials: SpecialTokens, parts: list[tuple[Part, list[int]]]) -> Reply:
    joined: list[int] = []
    untrained = []
    for part, ids in parts:
        if not part.trained:
            untrained.append(range(len(joined), len(joined) + len(ids)))
            joined += ids
        else:
            ended = with_eos(specials, ids)
            joined += ended if part.ends else ended[:-1]
    return Reply(joined, untrained)


class OverBudgetError(Exception):
    """A row has more tokens than it may: the reason it is counted under, the settings' key, and what was found."""


def within_budget(row: EncodedRow, settings: Tokenize) -> EncodedRow:
    """The row, if it fits or may be cut to fit. Raises OverBudgetError (reason, key, found) if not.

    What is cut is the prompt, to its last tokens (keep_end) or its first (keep_start), and with `cut_replies` the end
    of the replies.
    """
    longest = max((len(reply.ids) for reply in row.replies), default=0)
    if settings.truncation in ("error", "drop"):
        _require_fit(len(row.prompt), longest, settings)
        return row
    room = settings.max_prompt_length
    if not settings.cut_replies:
        least = min(len(row.prompt), 1)
        _require_fit(least, longest, settings)
        room = min(room, settings.max_length - longest)
    if len(row.prompt) > room:
        bos, text = row.prompt[: row.bos], row.prompt[row.bos :]
        start = len(row.prompt) - room if settings.truncation == "keep_end" else 0
        row = row._replace(prompt=[*bos, *text[start:]][:room], prompt_is_cut=True)
    limit = min(settings.max_completion_length or settings.max_length, settings.max_length - len(row.prompt))
    if longest > limit:
        row = row._replace(replies=[_cut(reply, limit) for reply in row.replies], reply_is_cut=True)
    return row


def _require_fit(prompt: int, longest: int, settings: Tokenize) -> None:
    completion = settings.max_completion_length
    if prompt > settings.max_prompt_length:
        found = f"prompt has {prompt} tokens, budget is {settings.max_prompt_length}"
        raise OverBudgetError(PROMPT_TOO_LONG, "max_prompt_length", found)
    if completion is not None and longest > completion:
        raise OverBudgetError(
            REPLY_TOO_LONG, "max_completion_length", f"reply has {longest} tokens, budget is {completion}"
        )
    if prompt + longest > settings.max_length:
        found = f"prompt and reply have {prompt + longest} tokens, budget is {settings.max_length}"
        raise OverBudgetError(TOO_LONG, "max_length", found)


def _cut(reply: Reply, limit: int) -> Reply:
    """The first tokens of a reply, up to the last that is trained."""
    end = min(limit, len(reply.ids))
    for others in reply.untrained:
        if others.start < end <= others.stop:
            end = others.start
    return Reply(reply.ids[:end], [others for others in reply.untrained if others.stop <= end])


def first_tokens(ids: list[int], bounds: tuple[int, ...], seed: int, source: str, row: int, bos: int = 0) -> list[int]:
    """The first k ids after BOS, k drawn evenly from `bounds` (least, most) by (seed, source, row)."""
    least, most = bounds
    drawn = int.from_bytes(hashlib.sha256(f"{seed}/{source}/{row}".encode()).digest()[:8])
    return ids[: bos + least + drawn % (most - least + 1)]


# The columns of each kind's table, beside `row` and `source`.


def sft_columns(encoded: EncodedRow, row: Conversation) -> dict[str, Any]:
    prompt, (reply,) = encoded.prompt, encoded.replies
    mask = [True] * len(reply.ids)
    for others in reply.untrained:
        mask[others.start : others.stop] = [False] * len(others)
    if not prompt:  # a whole text without BOS, whose first token no other predicts
        mask[0] = False
    if not any(mask):
        raise UnusableRowError("nothing_trained")
    texts = _texts_of_prompt(encoded, row.prompt, row.context._asdict())
    return {"input_ids": prompt + reply.ids, "loss_mask": [False] * len(prompt) + mask, **texts}


def preference_columns(encoded: EncodedRow, row: Conversation) -> dict[str, Any]:
    chosen, rejected = (reply.ids for reply in encoded.replies)
    if chosen == rejected:  # a template may cut off the white space that they differ in, and a budget the end
        raise UnusableRowError(EQUAL_REPLIES)
    return {"prompt_ids": encoded.prompt, "chosen_ids": chosen, "rejected_ids": rejected, "margin": row.margin}


def unpaired_columns(encoded: EncodedRow, row: Conversation) -> dict[str, Any]:
    (reply,) = encoded.replies
    # Which reply stands beside another prompt is known once all rows are.
    judged = {"label": row.label, "score": row.score, "mismatched_ids": None}
    return {"prompt_ids": encoded.prompt, "completion_ids": reply.ids, **judged}


def prompt_columns(encoded: EncodedRow, row: Conversation) -> dict[str, Any]:
    texts = _texts_of_prompt(encoded, row.prompt, {**row.context._asdict(), "text": row.text})
    return {"prompt_ids": encoded.prompt, "facts": json_text(row.facts), **texts}


def _texts_of_prompt(encoded: EncodedRow, messages: list[Message], known: dict[str, Any]) -> dict[str, str]:
    """What others are shown of a prompt in place of its ids. Of one that is cut, the text that the policy sees."""
    context = {name: value for name, value in known.items() if value is not None}
    if encoded.kept_text is not None:
        context |= {"text": encoded.kept_text, "cut": True}
    try:
        return {"messages": json_text(messages[: encoded.prompt_messages]), "context": json_text(context)}
    except ValueError:  # half a surrogate pair in an earlier turn of the assistant, which the template leaves out
        raise UnusableRowError(INVALID_UNICODE) from None


class Encoding(NamedTuple):
    """How rows of a kind are read, and what their table holds."""

    read: Callable[[dict[str, Any], str], Conversation]
    columns: Callable[[EncodedRow, Conversation], dict[str, Any]]
    schema: pyarrow.Schema


ENCODINGS: dict[Kind, Encoding] = {
    "sft": Encoding(sft_conversation, sft_columns, SFT_SCHEMA),
    "preference": Encoding(preference_conversation, preference_columns, PREFERENCE_SCHEMA),
    "unpaired": Encoding(unpaired_conversation, unpaired_columns, UNPAIRED_SCHEMA),
    "prompts": Encoding(prompt_conversation, prompt_columns, PROMPT_SCHEMA),
}


@dataclass
class Counts:
    """What went into a table, and what did not."""

    rows: int = 0
    prompt_tokens: int = 0
    replies: int = 0
    reply_tokens: int = 0
    trained_tokens: int = 0
    max_prompt_tokens: int = 0
    max_reply_tokens: int = 0
    max_tokens: int = 0  # of a prompt and its longest reply
    cut_prompts: int = 0
    cut_replies: int = 0
    reasoning_left_out: int = 0
    plain_texts: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def add_row(self, row: EncodedRow, columns: dict[str, Any]) -> None:
        prompt, lengths = len(row.prompt), [len(reply.ids) for reply in row.replies]
        longest = max(lengths, default=0)
        self.rows += 1
        self.prompt_tokens += prompt
        self.replies += len(lengths)
        self.reply_tokens += sum(lengths)
        self.trained_tokens += sum(columns.get("loss_mask", ()))
        self.max_prompt_tokens = max(self.max_prompt_tokens, prompt)
        self.max_reply_tokens = max(self.max_reply_tokens, longest)
        self.max_tokens = max(self.max_tokens, prompt + longest)
        self.cut_prompts += row.prompt_is_cut
        self.cut_replies += row.reply_is_cut
        self.reasoning_left_out += row.reasoning_left_out

    def add(self, other: "Counts") -> None:
        for name, value in vars(other).items():
            own = getattr(self, name)
            setattr(self, name, max(own, value) if name.startswith("max_") else own + value)
