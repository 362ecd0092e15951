"""The format of raw rows: the one that is named, or the only one that they can be of."""

from collections.abc import Collection
from typing import Literal

from stages.lib.command.errors import StageError
from stages.lib.data import hh_transcripts
from stages.lib.data.formats import (
    AS_THEY_ARE,
    COLUMNS,
    PAIRS,
    READERS,
    REPLIES,
    WHICH_IS_WHICH,
    WITHOUT_REPLIES,
    Format,
    missing_columns,
    refuse_disagreement,
)
from stages.lib.data.raw_rows import RawRow
from stages.lib.settings.reading import ReadingOptions

EITHER: list[Format] = ["preference_implicit", "preference"]  # for texts beside columns that may hold the prompt
# Beside chosen and rejected these leave no doubt that the prompt is in them.
BESIDE_AN_IMPLICIT_PROMPT = {*PAIRS["preference_implicit"].columns, *PAIRS["preference_implicit"].optional}


class FormatOfRows:
    """The one format of all rows: the one named, or the one that the first row is certain to be of.

    Rows of another file, or with other columns, must be certain to be of it, too: a folder of several formats is not
    read as the first of them.

    Args:
        facts: columns that ride on as facts, and so are no replies unless a format needs them.
    """

    def __init__(
        self,
        named: Literal["auto"] | Format,
        options: ReadingOptions = AS_THEY_ARE,
        facts: Collection[str] = (),
    ) -> None:
        refuse_disagreement(named, options)
        detected = named == "auto" and options.comparison is None
        self.name: Format | None = None
        if not detected:
            self.name = "comparison" if named == "auto" else named
        self._detected = detected
        self._facts = frozenset(facts)
        self._first = ""
        self._known: set[tuple[str, frozenset[str], bool]] = set()

    def of(self, row: RawRow, where: str) -> Format:
        """The format to read `row` in.

        Raises:
            StageError: it cannot be told, or it is not that of the first row.
        """
        if self.name is not None and (not self._detected or missing_columns(row, self.name)):
            return self.name
        kind = (where.rpartition(", ")[0], frozenset(row.keys() & COLUMNS), not row.keys() <= COLUMNS)
        if kind not in self._known:
            name = detect_format(row, where, self._facts)
            self.name, self._first = self.name or name, self._first or where
            if name != self.name:
                raise StageError(
                    f"{where}: the row is of format '{name}', and {self._first} of '{self.name}'; "
                    "give data of one format, or name in format what all rows are to be read as"
                )
            self._known.add(kind)
        assert self.name is not None, "the first row gives it, if the settings do not"
        return self.name


def detect_format(row: RawRow, where: str, facts: Collection[str] = ()) -> Format:
    """The only format that a row can be of, by its columns and the kinds of their values.

    Raises:
        StageError: none or several formats are possible (they are listed).
    """
    candidates = pair_candidates(row) + reply_candidates(row)
    if len(candidates) == 1:
        return candidates[0]
    found = f"columns {', '.join(row) or 'none'}"
    if candidates == EITHER:
        raise StageError(
            f"{where}: {found} could be of the formats preference_implicit (chosen and rejected both begin with the "
            "prompt; name it in format) or preference (the prompt stands in another column; name that prompt in "
            "columns)"
        )
    if candidates:
        raise StageError(f"{where}: {found} could be of the formats {' or '.join(candidates)}; name one in format")
    alone = [name for name in WITHOUT_REPLIES if not missing_columns(row, name)]
    others = row.keys() - {*facts, *(column for name in alone for column in columns_of(name))}
    if len(alone) == 1 and not others:
        return alone[0]
    if alone:
        raise StageError(
            f"{where}: {found} could be of the formats {' or '.join(alone)}, and a reply may stand in "
            f"{' or '.join(sorted(others)) or 'either'}; name one in format, or {WHICH_IS_WHICH}"
        )
    known = ", ".join(f"{name} ({', '.join(reader.columns)})" for name, reader in READERS.items() if reader.columns)
    raise StageError(f"{where}: {found} fit no format; {WHICH_IS_WHICH}. Known: {known}")


def columns_of(name: Format) -> tuple[str, ...]:
    return (*READERS[name].columns, *READERS[name].optional)


def pair_candidates(row: RawRow) -> list[Format]:
    """The formats of preference pairs that a row can be of."""
    if isinstance(row.get("input"), dict) and not missing_columns(row, "openai_preference"):
        return ["openai_preference"]
    if not {"chosen", "rejected"} <= row.keys():
        return []
    replies = (row["chosen"], row["rejected"])
    if all(hh_transcripts.is_transcript(reply) for reply in replies):
        return ["hh", "preference"] if "prompt" in row else ["hh"]
    explicit: tuple[Format, ...] = (
        "preference",
        "alpaca_preference",
        "question_preference",
        "messages_preference",
        "sharegpt_preference",
    )
    named = [name for name in explicit if not missing_columns(row, name)]
    if "messages" in row and row["messages"] == row["chosen"]:  # the chosen conversation once more, as in UltraFeedback
        named.remove("messages_preference")
    if named:
        return named
    if all(isinstance(reply, list) for reply in replies) or row.keys() <= BESIDE_AN_IMPLICIT_PROMPT:
        return ["preference_implicit"]
    # Texts beside columns that we do not know: one of those may be the prompt.
    return EITHER


def reply_candidates(row: RawRow) -> list[Format]:
    """The formats of single replies that a row can be of; conversations beside a pair are its prompt."""
    names = [name for name in REPLIES if not missing_columns(row, name)]
    beside_a_pair = {"chosen", "rejected"} <= row.keys()
    return [name for name in names if not (beside_a_pair and name in ("sharegpt", "messages"))]
