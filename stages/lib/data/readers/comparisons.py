"""Rows that compare responses become pairs, or, by a threshold, unpaired data; how is said in `comparison`.

Every shape comes down to responses and a number for each, the higher the better: votes, scores, places in an order.
"""

from collections.abc import Iterator
from itertools import combinations
from typing import Any, NamedTuple

from stages.lib.command.errors import StageError
from stages.lib.data import hh_transcripts
from stages.lib.data.cell_values import value_in_cell
from stages.lib.data.conversations import (
    LARGEST_FLOAT32,
    Example,
    Message,
    margin_from,
    messages_from,
    number_from,
    pair_from,
    reply_of,
)
from stages.lib.data.raw_rows import RawRow
from stages.lib.data.readers.prompt_and_reply import any_prompt, reply_in
from stages.lib.data.readers.reply_trees import ranked_replies
from stages.lib.data.readers.row_place import RowPlace, is_given
from stages.lib.data.row_errors import MalformedRowError, UnusableRowError
from stages.lib.settings.reading import (
    OrderedComparison,
    PairSettings,
    ScoredComparison,
    Threshold,
    TreeComparison,
    WinnerComparison,
    in_a_cell,
)


class Response(NamedTuple):
    """A response as the row holds it: its value, where it stands, and the object that it was taken from."""

    value: Any
    where: str
    item: Any


def read_comparison(row: RawRow, place: RowPlace) -> list[Example]:
    """The pairs of a row, best first; or each of its responses with its label.

    Raises:
        StageError: a vote says nothing that is known.
        MalformedRowError: a column is missing, a score is not a number.
        UnusableRowError: it gives no pair: nobody voted, all are alike, or only one response has a score.
    """
    settings = place.options.comparison
    assert settings is not None, "the format is only read with it"
    if isinstance(settings, TreeComparison):
        groups = [*ranked_replies(row, settings, place)]
        return kept(example for group in groups for example in pair_examples(*group, settings, place))
    responses, scores = scored_responses(row, settings, place)
    asked = any_prompt(row, place)
    conversations = [conversation_with(asked, response, row) for response in responses]
    if place.options.threshold is not None:
        return kept(labelled_examples(conversations, scores, place.options.threshold, place))
    return kept(pair_examples(conversations, scores, settings, place))


def kept(examples: Iterator[Example | str]) -> list[Example]:
    """The examples among reasons for which there are none; raises UnusableRowError where nothing else is."""
    made = [*examples]
    found = [example for example in made if isinstance(example, Example)]
    if not found:
        reasons = [reason for reason in made if isinstance(reason, str)]
        raise UnusableRowError(reasons[0] if reasons else "single_response")
    return found


def scored_responses(
    row: RawRow, settings: WinnerComparison | ScoredComparison | OrderedComparison, place: RowPlace
) -> tuple[list[Response], list[float]]:
    """The responses that can be compared, and a number for each, the higher the better."""
    responses = responses_in(row, settings.responses, settings.text_key, place)
    if isinstance(settings, WinnerComparison):
        if len(responses) != 2:
            raise MalformedRowError(f"{place.where}: expected two responses, found {len(responses)}", "not_two")
        if not all(is_given(response.value) for response in responses):
            raise UnusableRowError("empty_reply")
        return responses, votes_in(row, settings, place)
    if isinstance(settings, OrderedComparison):
        places = [float(number) for number in range(len(responses))]
        scores: list[float | None] = [*(reversed(places) if settings.best == "first" else places)]
    else:
        scores = scores_in(row, responses, settings, place)
    usable = [(response, score) for response, score in zip(responses, scores, strict=True) if score is not None]
    given = [(response, score) for response, score in usable if is_given(response.value)]
    for reason, number in (("no_score", len(responses) - len(usable)), ("empty_reply", len(usable) - len(given))):
        if number:
            place.counts[f"responses_left_out/{reason}"] += number
    return [response for response, _ in given], [score for _, score in given]


def responses_in(row: RawRow, columns: tuple[str, ...], text_key: str | None, place: RowPlace) -> list[Response]:
    """The values of several columns, or of the one that holds a list of them."""
    items = values_in(row, columns, place)
    if text_key is None:
        return [Response(item, where, item) for item, where in items]
    for item, where in items:
        if not isinstance(item, dict) or text_key not in item:
            raise MalformedRowError(f"{where}: expected an object with '{text_key}'", "bad_response")
    return [Response(item[text_key], f"{where}, '{text_key}'", item) for item, where in items]


def values_in(row: RawRow, columns: tuple[str, ...], place: RowPlace) -> list[tuple[Any, str]]:
    """Each value, and where it stands. A list may be written as text, as tables without types do."""
    for column in columns:
        if column not in row:
            found = ", ".join(row) or "none"
            raise MalformedRowError(f"{place.where}: no column '{column}' to compare, found {found}", "missing_column")
    if len(columns) > 1:
        return [(row[column], place.column(column)) for column in columns]
    values, where = row[columns[0]], place.column(columns[0])
    if isinstance(values, str):
        values = value_in_cell(values, where)
    if isinstance(values, dict):  # a list of objects, as Parquet files of `datasets` may hold it
        lists = values.values()
        if lists and all(isinstance(part, list) and len(part) == len(next(iter(lists))) for part in lists):
            values = [dict(zip(values, parts, strict=True)) for parts in zip(*lists, strict=True)]
    if not isinstance(values, list):
        raise MalformedRowError(f"{where}: expected a list, found {type(values).__name__}", "not_a_list")
    return [(value, f"{where}, {number}") for number, value in enumerate(values, start=1)]


def votes_in(row: RawRow, settings: WinnerComparison, place: RowPlace) -> list[float]:
    """How many votes there are for the first and for the second response.

    Raises:
        StageError: a vote stands for neither, and is no tie.
    """
    votes = [0.0, 0.0]
    said = [settings.first, settings.second]
    if settings.names:
        names = [row.get(column) for column in settings.names]
        if not all(is_given(name) for name in names) or in_a_cell(names[0]) == in_a_cell(names[1]):
            raise UnusableRowError("same_names")
        said = [(name,) for name in names]
    sides = [{in_a_cell(value) for value in values} for values in said]
    ties = {in_a_cell(value) for value in settings.tie}
    cast = [vote for column in settings.winner for vote in votes_of(row, column, place)]
    for vote, where in cast:
        text = in_a_cell(vote)
        side = next((number for number, values in enumerate(sides) if text in values), None)
        if side is not None:
            votes[side] += 1
        elif text not in ties:
            raise StageError(unknown_vote(where, text, [vote for vote, _ in cast], [*sides, ties]))
    if not cast:
        raise UnusableRowError("no_vote")
    return votes


def unknown_vote(where: str, text: str, cast: list[Any], known: list[set[str]]) -> str:
    """What is said of a vote that stands for nothing.

    It ends the run whatever becomes of unusable rows: where an index counts from 1 and is read as if from 0, leaving
    out what is unknown would leave nothing but pairs the wrong way round.
    """
    seen = ", ".join(sorted({repr(in_a_cell(vote)[:40]) for vote in cast}))
    first, second, tie = (", ".join(sorted(values)) or "nothing" for values in known)
    return (
        f"{where}: the vote {text[:40]!r} (of {seen}) is known for neither response: first is {first}, second "
        f"{second}, tie {tie}; say in comparison which values stand for the first response (first), for the second "
        "(second), and for neither (tie). An index may count from 0 or from 1"
    )


def votes_of(row: RawRow, column: str, place: RowPlace) -> list[tuple[Any, str]]:
    """The votes of one column, which may hold a list of them."""
    if column not in row:
        found = ", ".join(row) or "none"
        raise MalformedRowError(f"{place.where}: no column '{column}' to compare, found {found}", "missing_column")
    value, where = row[column], place.column(column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = value_in_cell(value, where)
    return [(vote, where) for vote in (value if isinstance(value, list) else [value]) if is_given(vote)]


def scores_in(
    row: RawRow, responses: list[Response], settings: ScoredComparison, place: RowPlace
) -> list[float | None]:
    """The score of each response, the higher the better; None where it has none."""
    if settings.score_key is not None:
        key = settings.score_key
        cells = [(response.item.get(key), f"{response.where}, beside it '{key}'") for response in responses]
    else:
        cells = values_in(row, settings.scores, place)
        if len(cells) != len(responses):
            raise MalformedRowError(
                f"{place.where}: {len(responses)} responses and {len(cells)} scores; each needs its own", "not_as_many"
            )
    sign = -1.0 if settings.best == "lowest" else 1.0
    scores = [score_from(value, where) for value, where in cells]
    return [None if score is None else sign * score for score in scores]


def score_from(value: Any, where: str) -> float | None:
    """A finite number, or None where there is none. Raises MalformedRowError for anything else."""
    if not is_given(value):
        return None
    score = number_from(value)
    if score is None:
        raise MalformedRowError(f"{where}: expected a finite number, found {str(value)[:40]!r}", "bad_score")
    return score


def require_float32(score: float, where: str) -> None:
    """Raise MalformedRowError for a score that no table of tokens can hold."""
    if abs(score) > LARGEST_FLOAT32:
        raise MalformedRowError(f"{where}: float32 does not hold the score {score:g}", "bad_score")


def conversation_with(asked: list[Message] | None, response: Response, row: RawRow) -> list[Message] | str:
    """The whole conversation of a response, or why it has none; without a prompt the response is a whole one."""
    try:
        if asked is not None:
            return [*asked, reply_in(response.value, response.where, asked, row.get("prompt"))]
        if hh_transcripts.is_transcript(response.value):
            messages = hh_transcripts.turns(response.value)
        elif isinstance(response.value, list):
            messages = messages_from(response.value, response.where)
        else:
            raise StageError(
                f"{response.where}: a response of text needs its prompt, and no column holds one; give yours the name "
                "'prompt' in columns"
            )
        reply_of(messages)
        return messages
    except UnusableRowError as error:
        return str(error)


def pair_examples(
    conversations: list[list[Message] | str], scores: list[float], settings: PairSettings, place: RowPlace
) -> Iterator[Example | str]:
    """The pairs of responses to one prompt, or the reason why a pair is not made, which is counted."""
    for better, worse, gap, reason in pairs_by(scores, settings):
        whole = (conversations[better], conversations[worse])
        reason = next((side for side in whole if isinstance(side, str)), reason)
        if reason is None:
            try:
                chosen, rejected = (side for side in whole if not isinstance(side, str))
                pair = pair_from(chosen, rejected)
                if gap == 0:
                    place.counts["pairs_kept/tie"] += 1
                margin = margin_from(gap, place.where) if settings.margin == "gap" else None
                yield Example(pair.prompt, pair.reply, pair.rejected, margin)
                continue
            except UnusableRowError as error:
                reason = str(error)
        place.counts[f"pairs_left_out/{reason}"] += 1
        yield reason


def pairs_by(scores: list[float], settings: PairSettings) -> Iterator[tuple[int, int, float, str | None]]:
    """(better, worse, gap, why there is no pair) for the pairs of responses that are to be made."""
    pairs = [*combinations(range(len(scores)), 2)]
    if settings.pairs == "best_against_worst" and pairs:
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        pairs = [(best, worst)] if best != worst else pairs[:1]
    for first, second in pairs:
        better, worse = (first, second) if scores[first] >= scores[second] else (second, first)
        gap = scores[better] - scores[worse]
        if gap == 0 and settings.ties == "keep":
            yield better, worse, gap, None
            yield worse, better, gap, None
        elif gap == 0:
            yield better, worse, gap, "tie"
        else:
            yield better, worse, gap, "small_gap" if gap < settings.least_gap else None


def labelled_examples(
    conversations: list[list[Message] | str], scores: list[float], threshold: Threshold, place: RowPlace
) -> Iterator[Example | str]:
    """Each response with its label by the threshold, or the reason why it has none, which is counted."""
    for conversation, score in zip(conversations, scores, strict=True):
        label = label_by(score, threshold)
        if label is not None and not isinstance(conversation, str):
            require_float32(score, place.where)
            yield Example(conversation[:-1], conversation[-1], label=label, score=score)
            continue
        reason = conversation if isinstance(conversation, str) else "between_thresholds"
        place.counts[f"responses_left_out/{reason}"] += 1
        yield reason


def label_by(score: float, threshold: Threshold) -> bool | None:
    """True for a good reply, False for a bad one, None for one between them."""
    if score >= threshold.good_from:
        return True
    return False if score < threshold.bad_below else None
