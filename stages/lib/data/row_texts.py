"""A prepared row as the texts that are encoded: its prompt, and its replies with what of them is trained.

Each kind of row says which conversations are to be rendered, and makes its texts of what the chat template gave. In a
conversation of several turns the assistant's replies are found in one of two ways:

- by the template's `{% generation %}` blocks, where it has one for each turn of the assistant;
- else by rendering the beginnings of the conversation: reply k stands between the rendering of what comes before it,
  opened for a reply, and what that of the conversation up to it adds. What stands there in the whole conversation must
  be the same, or the loss would be on what no model says in that place (templates that leave out the reasoning of
  earlier turns are refused so).
"""

from collections.abc import Sequence
from typing import NamedTuple

from stages.lib.data.chat import (
    NO_CONTEXT,
    TEMPLATE_REFUSES,
    RefusedRowError,
    asked,
    reasoning_left_out,
    rendered,
    reply_text,
    require_reply,
    require_said,
    require_tools,
    text_of_prompt,
)
from stages.lib.data.conversation_rows import Conversation
from stages.lib.data.conversations import Message
from stages.lib.data.encoding import SpecialTokens, refuse_special_tokens, texts_in, texts_of
from stages.lib.data.row_errors import UnusableRowError
from stages.lib.data.template_process import RenderingResult, ToRender
from stages.lib.settings.tokenize_data import LossOn

EARLIER_REPLY_CHANGED = "earlier_reply_changed"
NOTHING_TRAINED = "nothing_trained"


class Part(NamedTuple):
    """A text that is encoded by itself."""

    text: str
    trained: bool
    ends: bool  # an EOS follows, which is trained if the text is


class RowTexts(NamedTuple):
    """The texts of a row."""

    prompt: str  # before the first token that is trained or compared; empty for a row of whole text
    replies: list[list[Part]]  # each from its first part on, which is trained
    reasoning_left_out: bool = False
    prompt_messages: int = 0  # how many of the row's messages stand in `prompt`


Results = Sequence[RenderingResult]


class Recipe(NamedTuple):
    """How one row is rendered: what to ask for, and where its trained replies stand."""

    row: Conversation
    messages: list[Message]  # prompt and replies; of a conversation what comes up to its last trained reply
    trained: list[int]  # places in `messages` of the replies that are trained, or compared
    by_blocks: bool
    asked: list[ToRender]  # where the row has tools, last of all the one before it once more, without them


def recipe(specials: SpecialTokens, row: Conversation, loss_on: LossOn | None, *, marks_replies: bool) -> Recipe:
    """What to render for a row.

    Args:
        loss_on: which replies of a conversation are trained, where its turns have no weights; None for rows whose
            replies are compared or rated.
        marks_replies: the template has `{% generation %}` blocks.
    Raises:
        UnusableRowError: a text holds a special token, or each reply has weight 0.
    """
    made = recipe_of_texts(specials, row, loss_on, marks_replies=marks_replies)
    if not row.context.tools:
        return made
    return made._replace(asked=[*made.asked, made.asked[-1]._replace(tools=None)])


def recipe_of_texts(
    specials: SpecialTokens, row: Conversation, loss_on: LossOn | None, *, marks_replies: bool
) -> Recipe:
    """The same, but for what shows whether the template tells of tools."""
    if row.text is not None:
        refuse_special_tokens(specials, [row.text])
        return Recipe(row, [], [], False, [])
    refuse_special_tokens(specials, texts_of([*row.prompt, *row.replies]))
    if row.context is not NO_CONTEXT:
        refuse_special_tokens(specials, texts_in(row.context))
    if loss_on is None:
        start = asked(row.prompt, row.context, add_generation_prompt=True)
        wholes = [asked([*row.prompt, reply], row.context, add_generation_prompt=False) for reply in row.replies]
        places = [len(row.prompt) + number for number in range(len(row.replies))]
        return Recipe(row, [*row.prompt, *row.replies], places, False, [start, *wholes])
    trained = trained_turns(row, loss_on)
    messages = [*row.prompt, *row.replies][: trained[-1] + 1]
    if marks_replies:
        whole = asked(messages, row.context, add_generation_prompt=False, spans=True)
        return Recipe(row, messages, trained, True, [whole])
    conversations = []
    for place in trained:
        conversations.append(asked(messages[:place], row.context, add_generation_prompt=True))
        conversations.append(asked(messages[: place + 1], row.context, add_generation_prompt=False))
    return Recipe(row, messages, trained, False, conversations)


def trained_turns(row: Conversation, loss_on: LossOn) -> list[int]:
    """Places of the replies to train: by weight where a turn has one (1 where another has none), else by `loss_on`.

    Raises UnusableRowError if each has weight 0.
    """
    last = len(row.prompt)
    if row.weights is None:
        return [last] if loss_on == "last_reply" else [*earlier_replies(row.prompt), last]
    trained = [place for place in (*earlier_replies(row.prompt), last) if row.weights[place] != 0]
    if not trained:
        raise UnusableRowError(NOTHING_TRAINED)
    return trained


def earlier_replies(prompt: Sequence[Message]) -> list[int]:
    """Places of the assistant's turns that answer something: not of one that opens the conversation."""
    opened = next((place for place, turn in enumerate(prompt) if turn["role"] in ("user", "tool")), len(prompt))
    return [place for place, turn in enumerate(prompt) if turn["role"] == "assistant" and place > opened]


def row_texts(specials: SpecialTokens, made: Recipe, results: Results, loss_on: LossOn | None) -> RowTexts:
    """The texts of a row, of what the chat template gave for `made.asked`.

    Raises:
        RefusedRowError: the chat template refuses the row, leaves something out, or does not show where a reply is.
        StageError: rendering it took more time or memory than a chat template may take.
    """
    row = made.row
    if row.context.tools:
        *results, without_tools = results
        require_tools(row.context.tools, rendered(results[-1]).text, without_tools)
    if row.text is not None:
        return RowTexts(row.text, []) if loss_on is None else RowTexts("", [[Part(row.text, True, True)]])
    if loss_on is None:
        prompt = text_of_prompt(results[0], row.prompt)
        wholes = [rendered(result).text for result in results[1:]]
        replies = [reply_text(specials, prompt, whole, reply) for whole, reply in zip(wholes, row.replies, strict=True)]
        texts = RowTexts(prompt, [[Part(reply, True, True)] for reply in replies])
        whole = "".join([prompt, *replies])
    else:
        places_by = places_by_blocks if made.by_blocks else places_by_beginnings
        whole, places = places_by(specials, made, results)
        texts = conversation_texts(specials, whole, places)
    asked_with = made.trained[0] if made.trained else len(row.prompt)
    left_out = reasoning_left_out(made.messages, whole)
    return texts._replace(reasoning_left_out=left_out, prompt_messages=asked_with)


def places_by_beginnings(specials: SpecialTokens, made: Recipe, results: Results) -> tuple[str, list[tuple[int, int]]]:
    """The whole text, and from where to where in it each trained reply stands. Raises as `row_texts`."""
    text_of_prompt(results[-2], made.messages[:-1])
    texts = [rendered(result).text for result in results]
    whole, places = texts[-1], []
    for place, start, up_to_it in zip(made.trained, texts[::2], texts[1::2], strict=True):
        reply = reply_text(specials, start, up_to_it, made.messages[place])
        if not whole.startswith(start + reply) or (places and len(start) < places[-1][1]):
            raise RefusedRowError(
                EARLIER_REPLY_CHANGED,
                f"the chat template renders the assistant's message {place + 1} otherwise once the conversation goes "
                f"on (it may leave out earlier reasoning): {_beginning_of(reply)} becomes "
                f"{_beginning_of(whole[len(start) :])}, so it cannot be trained in its place; set "
                "tokenize_data.loss_on: last_reply",
            )
        places.append((len(start), len(start) + len(reply)))
    return whole, places


def places_by_blocks(specials: SpecialTokens, made: Recipe, results: Results) -> tuple[str, list[tuple[int, int]]]:
    """The same by the template's `{% generation %}` blocks. Raises as `row_texts`."""
    (result,) = results
    whole, blocks = rendered(result)
    turns = [place for place, message in enumerate(made.messages) if message["role"] == "assistant"]
    if len(blocks) != len(turns):
        raise RefusedRowError(
            TEMPLATE_REFUSES,
            f"the chat template has {{% generation %}} around {len(blocks)} parts of a conversation with {len(turns)} "
            "messages of the assistant; expected one for each",
        )
    require_said(made.messages, whole)
    places = []
    for place in made.trained:
        start, end = blocks[turns.index(place)]
        reply = whole[start:end].partition(specials.eos)[0]
        require_reply(made.messages[place], reply)
        places.append((start, start + len(reply)))
    return whole, places


def conversation_texts(specials: SpecialTokens, whole: str, places: list[tuple[int, int]]) -> RowTexts:
    """Cut a conversation where its trained replies begin and end; what comes after the last is left out."""
    eos = specials.eos
    parts = []
    for (start, end), (next_start, _) in zip(places, [*places[1:], (len(whole), 0)], strict=True):
        is_last = start == places[-1][0]
        ends = is_last or whole.startswith(eos, end)
        parts.append(Part(whole[start:end], True, ends))
        between = whole[end + len(eos) * ends : next_start]
        if between and not is_last:
            parts.append(Part(between, False, False))
    return RowTexts(whole[: places[0][0]], [parts])


def _beginning_of(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
