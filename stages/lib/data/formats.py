"""Raw rows of the formats that people have, read as examples: the table of formats, and what all of them share.

Pairs
    hh                   chosen, rejected: transcripts with "\\n\\nHuman:" and "\\n\\nAssistant:" before each turn
    preference           prompt, chosen, rejected: each text, or messages (TRL, OpenRLHF)
    preference_implicit  chosen, rejected: whole conversations, or texts that begin alike; the prompt is the common part
    alpaca_preference    instruction, chosen, rejected, and where present input (LLaMA-Factory)
    question_preference  question, chosen, rejected, and where present context
    messages_preference  messages: the prompt; chosen, rejected: a text or a message each
    sharegpt_preference  conversations: the prompt; chosen, rejected: a text or a message each (LLaMA-Factory)
    openai_preference    input: an object of messages and tools; preferred_output, non_preferred_output
    comparison           responses, and what says which is better, as the setting `comparison` describes
Single replies
    alpaca               instruction, output, and where present input
    messages             messages, the last one being the reply (OpenAI, TRL)
    prompt_completion    prompt, completion: each text or messages (TRL)
    sharegpt             conversations of from and value, the last one being the reply
    question_answer      question, answer, and where present context
Neither
    prompt               prompt: text or messages, and no reply (TRL's prompt-only)
    text                 text: trained as a whole, or a raw prompt

Beside them are read, where they are present:

    system                a text: the system message, in every format of conversations
    tools, functions      descriptions of tools, a list or JSON text
    chat_template_kwargs  an object: arguments of the chat template for this row (TRL)
    margin                a number, beside a pair
    label                 true or false, beside a single reply: whether it is a good one (TRL's unpaired preference)
    history               pairs of texts (user, assistant): earlier turns, before a prompt that is a text

A prompt whose text is a transcript is read as its turns.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from stages.lib.command.errors import StageError
from stages.lib.data.conversations import Example, Message, checked, margin_from, text_from
from stages.lib.data.prompts import json_text
from stages.lib.data.raw_rows import RawRow
from stages.lib.data.readers import comparisons, pairs, single_replies
from stages.lib.data.readers.prompt_and_reply import BESIDE_A_TEXT, COLUMNS_OF_PROMPTS
from stages.lib.data.readers.reply_trees import DELETED
from stages.lib.data.readers.row_place import RowPlace, is_given
from stages.lib.data.row_errors import MalformedRowError, UnusableRowError
from stages.lib.data.tool_calls import object_from, refuse_arguments_of_the_renderer, tools_from
from stages.lib.data.winner_columns import refuse_score_columns, refuse_winner_columns, refuse_winner_of_replies
from stages.lib.settings.declaration import block
from stages.lib.settings.reading import (
    OrderedComparison,
    PairSettings,
    ReadingOptions,
    ScoredComparison,
    TreeComparison,
    WinnerComparison,
)

Format = Literal[
    "hh",
    "preference",
    "preference_implicit",
    "alpaca_preference",
    "question_preference",
    "messages_preference",
    "sharegpt_preference",
    "openai_preference",
    "comparison",
    "alpaca",
    "messages",
    "prompt_completion",
    "sharegpt",
    "question_answer",
    "prompt",
    "text",
]
AS_THEY_ARE = ReadingOptions(**block(ReadingOptions))  # no template, no comparison, no threshold


class Reader(NamedTuple):
    """How a format is read: the columns that it needs, those that it reads where they are present, and the function."""

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[RawRow, RowPlace], list[Example]]


SHARED = ("system", "tools", "functions", "chat_template_kwargs")
OF_A_PAIR = (*SHARED, "margin")
OF_A_REPLY = (*SHARED, "label")
PAIRS: dict[Format, Reader] = {
    "hh": Reader(("chosen", "rejected"), OF_A_PAIR, pairs.read_hh),
    "preference": Reader(("prompt", "chosen", "rejected"), ("input", "history", *OF_A_PAIR), pairs.read_preference),
    "preference_implicit": Reader(("chosen", "rejected"), ("history", *OF_A_PAIR), pairs.read_preference_implicit),
    "alpaca_preference": Reader(
        ("instruction", "chosen", "rejected"), ("input", "history", *OF_A_PAIR), pairs.read_alpaca_preference
    ),
    "question_preference": Reader(
        ("question", "chosen", "rejected"), ("context", "history", *OF_A_PAIR), pairs.read_question_preference
    ),
    "messages_preference": Reader(("messages", "chosen", "rejected"), OF_A_PAIR, pairs.read_messages_preference),
    "sharegpt_preference": Reader(("conversations", "chosen", "rejected"), OF_A_PAIR, pairs.read_sharegpt_preference),
    "openai_preference": Reader(
        ("input", "preferred_output", "non_preferred_output"), OF_A_PAIR, pairs.read_openai_preference
    ),
    "comparison": Reader((), (), comparisons.read_comparison),  # its columns are those of the setting
}
REPLIES: dict[Format, Reader] = {
    "alpaca": Reader(("instruction", "output"), ("input", "history", *OF_A_REPLY), single_replies.read_alpaca),
    "messages": Reader(("messages",), OF_A_REPLY, single_replies.read_messages),
    "prompt_completion": Reader(
        ("prompt", "completion"), ("input", "history", *OF_A_REPLY), single_replies.read_prompt_completion
    ),
    "sharegpt": Reader(("conversations",), OF_A_REPLY, single_replies.read_sharegpt),
    "question_answer": Reader(
        ("question", "answer"), ("context", "history", *OF_A_REPLY), single_replies.read_question_answer
    ),
}
WITHOUT_REPLIES: dict[Format, Reader] = {
    "prompt": Reader(("prompt",), ("input", "history", *SHARED), single_replies.read_prompt),
    "text": Reader(("text",), (), single_replies.read_text),
}
READERS: dict[Format, Reader] = PAIRS | REPLIES | WITHOUT_REPLIES
COLUMNS = frozenset(column for reader in READERS.values() for column in (*reader.columns, *reader.optional))
WITHOUT_PAIRS: tuple[Format, ...] = (*REPLIES, *WITHOUT_REPLIES)


def examples_of(
    row: RawRow,
    name: Format,
    options: ReadingOptions,
    where: str,
    *,
    facts: Mapping[str, Any] | None = None,
    renames: Mapping[str, str] | None = None,
    counts: Counter | None = None,
) -> list[Example]:
    """Read one raw row of format `name`, its columns under our names.

    Args:
        where: file and row, for the message of an error.
        facts: what is to ride on with the prompt (see `picked_facts`).
        renames: own column: ours, as the user renamed them before.
        counts: gets what is cut from a row that is used, and the pairs that a comparison does not give, by reason.
    Returns:
        One example; of a comparison one or more, and pairs that break a rule are left out and counted.
    Raises:
        StageError: the row says something that would be read wrongly, whatever is done with unusable rows.
        MalformedRowError: a column is missing or of the wrong type, a role is unknown.
        UnusableRowError: the row is well formed and of no use, such as one with an empty reply.
    """
    refuse_disagreement(name, options, f"{where}: ")
    if missing := missing_columns(row, name):
        raise MalformedRowError(
            f"{where}: format '{name}' needs the column '{missing[0]}', found {', '.join(row) or 'none'}; "
            f"name another format, or {WHICH_IS_WHICH}",
            "missing_column",
        )
    facts = facts or {}
    if name in PAIRS and not isinstance(options.comparison, TreeComparison):
        read = columns_read(name, options)
        if name != "comparison":
            refuse_score_columns(row, read, facts, renames or {}, where)
        refuse_winner_columns(row, read, facts, renames or {}, where)
    if name in REPLIES:
        refuse_winner_of_replies(row, columns_read(name, options), facts, renames or {}, where)
    place = RowPlace(where, options, Counter() if counts is None else counts)
    found = READERS[name].read(row, place)
    if options.input_template is not None and not place.templated:
        raise StageError(f"{where}: input_template is for prompts that are texts, and this one is not; make it null")
    examples = [completed(example, row, name, place) for example in found]
    if len(examples) == 1:
        return [replace(checked(examples[0]), facts=dict(facts))]
    return [replace(example, facts=dict(facts)) for example in usable(examples, place.counts)]


# What every message says that asks for columns to be named: a column that says who won must not be passed over.
WHICH_IS_WHICH = (
    "say in columns which of yours is which; where a column, scores or ranks say which of several responses is the "
    "better one, describe that in comparison"
)


def refuse_disagreement(name: str, options: ReadingOptions, where: str = "") -> None:
    """Raise a StageError, beginning with `where`, if a format, or auto for any, and the options do not go together."""
    if name == "comparison" and options.comparison is None:
        raise StageError(f"{where}format comparison needs the setting comparison: what is compared, and how")
    if name not in ("auto", "comparison") and options.comparison is not None:
        raise StageError(f"{where}comparison is set, and format is '{name}': make it comparison or auto")
    if options.threshold is not None and options.comparison is None and name not in ("auto", *REPLIES):
        raise StageError(
            f"{where}threshold makes unpaired data of single replies, and format '{name}' does not have them"
        )


def missing_columns(row: RawRow, name: Format) -> list[str]:
    return [column for column in READERS[name].columns if column not in row]


def columns_read(name: Format, options: ReadingOptions) -> frozenset[str]:
    """The columns that the reader of a format looks at, those that a row need not have included."""
    reader, comparison, threshold = READERS[name], options.comparison, options.threshold
    read = {*reader.columns, *reader.optional}
    if name == "comparison" and comparison is not None:
        read = {*SHARED, *columns_compared(comparison)}
    if threshold is not None and threshold.score is not None:
        read = (read - {"label"}) | {threshold.score}
    return frozenset(read)


def columns_compared(comparison: PairSettings) -> set[str]:
    """The columns that a comparison reads; of a flat file of messages, those that its trees are made of."""
    prompts = {*COLUMNS_OF_PROMPTS, *BESIDE_A_TEXT}
    match comparison:
        case WinnerComparison():
            margin = {"margin"} if comparison.margin == "none" else set()
            return prompts | margin | {*comparison.responses, *comparison.winner, *comparison.names}
        case ScoredComparison():
            return prompts | {*comparison.responses, *comparison.scores}
        case OrderedComparison():
            return prompts | {*comparison.responses}
        case TreeComparison(root=None):
            keys = (comparison.text_key, comparison.role_key, comparison.replies_key, comparison.rank_key, DELETED)
            own = {comparison.id_key, comparison.parent_key} - {None}
            return {*keys, *(str(column) for column in own)}
        case TreeComparison(root=root):
            return {str(root)}
    raise AssertionError("each type of comparison is above")


def completed(example: Example, row: RawRow, name: Format, place: RowPlace) -> Example:
    """The example with what the columns say that all formats share."""
    if example.text is not None:
        return example
    read = columns_read(name, place.options)
    if example.rejected is not None and "margin" in read and is_given(row.get("margin")):
        example = replace(example, margin=margin_from(row["margin"], place.where))
    if name in REPLIES:
        score = rating_of(row, place)
        example = replace(example, label=label_from(row, place, score), score=score)
    if tools := tools_of(row, place):
        example = replace(example, tools=tools)
    arguments = object_from(row.get("chat_template_kwargs"), place.column("chat_template_kwargs"))
    refuse_arguments_of_the_renderer(arguments or {}, place.column("chat_template_kwargs"))
    return replace(example, prompt=with_system(example.prompt, row, place), template_arguments=arguments)


def rating_of(row: RawRow, place: RowPlace) -> float | None:
    """The score of a single reply, from the column that the threshold names; None without one."""
    threshold = place.options.threshold
    if threshold is None or threshold.score is None:
        return None
    if threshold.score not in row:
        raise MalformedRowError(f"{place.where}: no column '{threshold.score}' with its score", "missing_column")
    score = comparisons.score_from(row[threshold.score], place.column(threshold.score))
    if score is None:
        raise UnusableRowError("no_score")
    comparisons.require_float32(score, place.column(threshold.score))
    return score


def label_from(row: RawRow, place: RowPlace, score: float | None) -> bool | None:
    """Whether a single reply is a good one, by its score or by its label; None where nothing says so."""
    threshold = place.options.threshold
    if threshold is not None and score is not None:
        label = comparisons.label_by(score, threshold)
        if label is None:
            raise UnusableRowError("between_thresholds")
        return label
    if "label" not in row:
        return None
    value = row["label"].strip().lower() if isinstance(row["label"], str) else row["label"]
    known = {"true": True, "false": False}
    if isinstance(value, bool) or (isinstance(value, str) and value in known):
        return value if isinstance(value, bool) else known[value]
    raise MalformedRowError(
        f"{place.column('label')}: expected true or false, whether the reply is a good one, found {row['label']!r}; "
        "for numbers set threshold (score: label), and put a label of something else into ignore_columns",
        "bad_label",
    )


def tools_of(row: RawRow, place: RowPlace) -> list[dict[str, Any]] | None:
    given = [column for column in ("tools", "functions") if is_given(row.get(column))]
    if len(given) > 1:
        raise StageError(f"{place.where}: the columns 'tools' and 'functions' both describe tools; ignore one by name")
    return tools_from(row[given[0]], place.column(given[0])) if given else None


def with_system(prompt: list[Message], row: RawRow, place: RowPlace) -> list[Message]:
    """The prompt with the text of the column `system` as its first message, unless that is there already."""
    content = text_from(row.get("system"), place.column("system"))
    if not content.strip():
        return prompt
    if not prompt or prompt[0]["role"] != "system":
        return [{"role": "system", "content": content}, *prompt]
    if prompt[0]["content"].strip() != content.strip():
        raise MalformedRowError(
            f"{place.where}: the column 'system' says something else than the conversation's own system message; "
            "keep one",
            "two_system_messages",
        )
    return prompt


def usable(examples: list[Example], counts: Counter) -> list[Example]:
    """Those of a comparison's examples that keep to the rules. Raises UnusableRowError if none does."""
    kept, reasons = [], []
    for example in examples:
        try:
            kept.append(checked(example))
        except UnusableRowError as error:
            reasons.append(str(error))
            counts[f"{'pairs' if example.rejected else 'responses'}_left_out/{error}"] += 1
    if not kept:
        raise UnusableRowError(reasons[0])
    return kept


def picked_facts(row: RawRow, names: tuple[str, ...], where: str) -> dict[str, Any]:
    """The values of a raw row's columns that ride on with its prompts, under their names.

    Raises:
        MalformedRowError: a column is missing, or holds what JSON cannot, such as a date or bytes.
    """
    for name in names:
        if name not in row:
            found = ", ".join(row) or "none"
            raise MalformedRowError(f"{where}: no column '{name}' for facts, found {found}", "missing_column")
        try:
            json_text(row[name])
        except (TypeError, ValueError, RecursionError):
            found = type(row[name]).__name__
            raise MalformedRowError(
                f"{where}, '{name}': a fact must be a value that JSON has, found {found}", "bad_fact"
            ) from None
    return {name: row[name] for name in names}
