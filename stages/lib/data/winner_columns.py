"""Columns that may say which of two responses is better, beside a chosen and a rejected one.

Two responses that are named chosen and rejected by hand, beside a column that says which of them won, would be read the
wrong way round in as many rows as the second one won: such a column must be described in `comparison`, or ignored by
name.
"""

import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.data.raw_rows import RawRow
from stages.lib.data.readers.row_place import is_given
from stages.lib.settings.reading import in_a_cell

WORD_OF_A_WINNER = re.compile(
    "win|winner|winning|won|preferred|preferences?|better|best|safer|choice|verdict|judge?ment|vote[sd]?|favou?red|"
    "labels?|rank|ranking"
)
# How a winner is written, as `in_a_cell` gives it.
VOTE = re.compile("-1|[0-3]|[ab]|true|false|tie|left|right|first|second|model_[ab]", re.IGNORECASE)
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def refuse_winner_columns(
    row: RawRow, read: Collection[str], facts: Mapping[str, Any], renames: Mapping[str, str], where: str
) -> None:
    """Raise a StageError if a column that nothing reads may say which of the row's two replies is better.

    By its name; and where `renames` (own column: ours) made the user's columns chosen and rejected, also by its value,
    and though it rides on as one of the `facts`.
    """
    own = [own for own, ours in renames.items() if ours in ("chosen", "rejected")]
    unread = {column: row[column] for column in row if column not in read and column not in facts}
    suspect = {column for column in unread if names_a_winner(column) or (own and is_like_a_vote(unread[column], own))}
    suspect |= {column for column in facts if own and names_a_winner(column)}
    for column in sorted(suspect):
        if is_given(unread.get(column, facts.get(column))):
            raise StageError(
                f"{where}: the column '{column}' may say which of the two replies is better, which chosen and rejected "
                "would not follow; describe it in comparison (type: winner), or put it into ignore_columns if chosen "
                "is the better one in every row"
            )


@functools.lru_cache(maxsize=1024)  # asked for every row
def names_a_winner(column: str) -> bool:
    return any(WORD_OF_A_WINNER.fullmatch(word.lower()) for word in WORD.findall(column))


def is_like_a_vote(value: Any, own: list[str]) -> bool:
    """True for a number, a letter or a name that could stand for one of two columns, or a list of such."""
    values = value if isinstance(value, list) else [value]
    votes = [in_a_cell(vote) for vote in values if isinstance(vote, str | int | float)]
    return len(votes) == len(values) and all(VOTE.fullmatch(vote) or vote in own for vote in votes)
