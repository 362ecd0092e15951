"""Columns that may say which of several responses is better, beside replies that are read as they are named.

Two responses that are named chosen and rejected by hand, beside a column that says which of them won or scored more,
would be read the wrong way round in as many rows as the second one did: such a column must be described in
`comparison`, or ignored by name. An object is looked into, one level deep.
"""

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.data.conversations import number_from
from stages.lib.data.raw_rows import RawRow
from stages.lib.data.readers.row_place import is_given
from stages.lib.settings.reading import in_a_cell

WORD_OF_A_WINNER = re.compile(
    "win|winner|winning|won|preferred|preferences?|better|best|safer|choice|verdict|judge?ment|vote[sd]?|favou?red|"
    "labels?|rank|ranking"
)
WORD_OF_A_SCORE = re.compile(
    "scored?|scores|scoring|ratings?|rated|rewards?|overall|quality|helpful(ness)?|grades?|graded|points|stars|upvotes|"
    "likert|elo|utility"
)
# How a winner is written, as `in_a_cell` gives it.
VOTE = re.compile("-1|[0-3]|[ab]|true|false|tie|left|right|first|second|model_[ab]", re.IGNORECASE)
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
BETTER_AND_WORSE = {"chosen": ("chosen", "preferred_output"), "rejected": ("rejected", "non_preferred_output")}
Sides = tuple[str, str]  # the part of a name by which the columns of the chosen and of the rejected reply differ
NAMED = ("chosen", "rejected")


def refuse_winner_columns(
    row: RawRow, read: Collection[str], facts: Mapping[str, Any], renames: Mapping[str, str], where: str
) -> None:
    """Raise a StageError if a column that nothing reads may say which of the row's two replies is better.

    By its name; and where `renames` (own column: ours) made the user's columns chosen and rejected, also by its value,
    and though it rides on as one of the `facts`.
    """
    own = own_replies(renames)
    unread = with_keys({column: row[column] for column in row if column not in read and column not in facts})
    suspect = {column for column in unread if names_a_winner(column) or (own and is_like_a_vote(unread[column], own))}
    known = with_keys(facts) if own else {}
    suspect |= {column for column in known if names_a_winner(column)}
    for column in sorted(suspect):
        if is_given(unread.get(column, known.get(column))):
            raise StageError(
                f"{where}: the column '{column}' may say which of the two replies is better, which chosen and rejected "
                "would not follow; describe it in comparison (type: winner), or put "
                f"{'it' if column in row else repr(outer_of(column, row))} into ignore_columns if chosen is the better "
                "one in every row"
            )


def refuse_score_columns(
    row: RawRow, read: Collection[str], facts: Mapping[str, Any], renames: Mapping[str, str], where: str
) -> None:
    """Raise a StageError if scores that nothing reads may say that the rejected reply is the better one.

    Scores of replies that the data itself names chosen and rejected must not contradict it. Where `renames` (own
    column: ours) gave them these names, any score is refused, and any two numbers of which each is of one reply.
    What is named among the `facts` is left to whoever named it.
    """
    unread = with_keys({column: row[column] for column in row if column not in read and column not in facts})
    own = own_replies(renames)
    agreeing: set[str] = set()
    for better, worse in sides_of(renames):
        for column, other in columns_of_sides(unread, better, worse):
            left, right = number_from(unread[column]), number_from(unread[other])
            named = {better, worse} == {*NAMED}
            if left is None or right is None or (named and not names_a_score(column)):
                continue
            if not named or left < right:
                raise StageError(refused_scores(where, column, other, unread, row))
            agreeing |= {column, other}
    for column in sorted(unread.keys() - agreeing):
        if own and names_a_score(column) and is_given(unread[column]) and not isinstance(unread[column], dict):
            raise StageError(refused_scores(where, column, None, unread, row))


def refuse_winner_of_replies(
    row: RawRow, read: Collection[str], facts: Mapping[str, Any], renames: Mapping[str, str], where: str
) -> None:
    """Raise a StageError if a column that nothing reads may say that another reply than the one named is better."""
    if not any(ours in ("completion", "output", "answer") for ours in renames.values()):
        return
    unread = with_keys({column: row[column] for column in row if column not in read and column not in facts})
    for column in sorted(unread):
        if names_a_winner(column) and is_given(unread[column]):
            raise StageError(
                f"{where}: the column '{column}' may say which of several replies is the better one, and it may be "
                "another than the one that columns names; describe it in comparison (type: winner), of which the "
                f"better reply serves sft, or put {outer_of(column, row)!r} into ignore_columns"
            )


def refused_scores(where: str, column: str, other: str | None, unread: Mapping[str, Any], row: RawRow) -> str:
    said = f"the column '{column}' may say"
    if other is not None:
        said = f"'{column}' is {unread[column]} for chosen and '{other}' {unread[other]} for rejected: they may say"
    ignored = sorted({outer_of(name, row) for name in (column, other) if name is not None})
    return (
        f"{where}: {said} which of the two replies is better, and nothing here heeds that; describe it in comparison "
        f"(type: scores), or put {' and '.join(map(repr, ignored))} into ignore_columns if chosen is the better one in "
        "every row"
    )


def own_replies(renames: Mapping[str, str]) -> list[str]:
    """The user's columns that were renamed to hold the two replies."""
    return [own for own, ours in renames.items() if any(ours in names for names in BETTER_AND_WORSE.values())]


def sides_of(renames: Mapping[str, str]) -> list[Sides]:
    """By what the names of columns of the chosen and of the rejected reply may differ: (chosen, rejected), (a, b), …"""
    own = [
        next((own for own, ours in renames.items() if ours in names), side) for side, names in BETTER_AND_WORSE.items()
    ]
    parts = [name_parts(name) for name in own]
    differing = [(left, right) for left, right in zip(*parts, strict=False) if left != right]
    if len(parts[0]) != len(parts[1]) or len(differing) != 1:
        return [NAMED]
    # Where the two have changed places, the scores named after them have as well.
    return differing if {*differing[0]} == {*NAMED} else [NAMED, *differing]


def columns_of_sides(names: Collection[str], better: str, worse: str) -> Iterator[tuple[str, str]]:
    """Columns whose names differ in being of the one or of the other side, such as score_a and score_b."""
    by_parts = {name_parts(name): name for name in names}
    for parts, name in by_parts.items():
        for place, part in enumerate(parts):
            if part == better and (other := by_parts.get((*parts[:place], worse, *parts[place + 1 :]))):
                yield name, other


def with_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The columns, and the keys of objects in them, as `column.key`."""
    inner = {
        f"{column}.{key}": item
        for column, value in values.items()
        if isinstance(value, dict)
        for key, item in value.items()
    }
    return {**values, **inner}


def outer_of(name: str, row: RawRow) -> str:
    """The column itself, or the one whose object a key is of."""
    return name if name in row else next((column for column in row if name.startswith(f"{column}.")), name)


@functools.lru_cache(maxsize=1024)
def name_parts(column: str) -> tuple[str, ...]:
    return tuple(part.lower() for part in PART.findall(column))


@functools.lru_cache(maxsize=1024)
def names_a_score(column: str) -> bool:
    return any(WORD_OF_A_SCORE.fullmatch(word.lower()) for word in WORD.findall(column))


@functools.lru_cache(maxsize=1024)  # asked for every row
def names_a_winner(column: str) -> bool:
    return any(WORD_OF_A_WINNER.fullmatch(word.lower()) for word in WORD.findall(column))


def is_like_a_vote(value: Any, own: list[str]) -> bool:
    """True for a number, a letter or a name that could stand for one of two columns, or a list of such."""
    values = value if isinstance(value, list) else [value]
    votes = [in_a_cell(vote) for vote in values if isinstance(vote, str | int | float)]
    return len(votes) == len(values) and all(VOTE.fullmatch(vote) or vote in own for vote in votes)
