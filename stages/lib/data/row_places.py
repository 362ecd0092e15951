"""Where each row of all sources goes: into a split, or nowhere, for a reason that is counted.

1. A group is a prompt and all prompts that go on from it: conversations in which its messages are the first ones. Every
   group stands on one side. Where a source says which split its rows belong to, the group is there, with test before
   validation and validation before train; rows of the group that belong elsewhere are left out as leaks.
2. Groups of which no source says it are drawn: into test and validation those with small digests (a draw, since digests
   are uniform), a share of the distinct prompts; the others into train.
3. Of rows with equal content of one kind the first one stays.
4. Train rows are drawn by weight or number, for each kind by itself: those of a source with the smallest digests of
   seed, source and content. More data of one source moves few of another's.

Digests and places stand in a database in a file: memory holds a fixed number of its pages and of those it sorts, some
16 MiB, however many rows there are. On disk a row with a prompt of its own takes some 130 bytes, and each beginning of
a prompt some 90 more.
"""

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from stages.lib.command.errors import StageError
from stages.lib.data.prepared_rows import KINDS, Kind, Split

PAGES_IN_MEMORY = 8_192  # of 1 KiB
PLACES: tuple[Split, ...] = ("test", "validation", "train")  # in the order in which they claim a group
LEAK, REASONS = len(PLACES), ("in_test", "in_validation", "duplicate", "near_duplicate", "contaminated", "not_drawn")
FATES = (*PLACES, *REASONS)  # what becomes of a row; a leak's reason is that of the split with its prompt
TRAIN = PLACES.index("train")

TABLES = """
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    CREATE TABLE rows
        (number INTEGER PRIMARY KEY, source INT, kind INT, given INT, prompt BLOB, content BLOB, fate INT);
    CREATE TABLE beginnings (prompt BLOB, position INT, beginning BLOB);
"""
GROUPS = """
    CREATE TABLE prompts (prompt BLOB PRIMARY KEY, first BLOB) WITHOUT ROWID;
    INSERT INTO prompts SELECT DISTINCT prompt, prompt FROM rows ORDER BY prompt;
    CREATE INDEX beginnings_of ON beginnings (prompt, position, beginning);
    UPDATE prompts SET first = coalesce(
        (SELECT beginning FROM beginnings WHERE beginnings.prompt = prompts.prompt
         AND beginning IN (SELECT prompt FROM prompts) ORDER BY position LIMIT 1), prompt)
    WHERE prompt IN (SELECT prompt FROM beginnings);
    CREATE TABLE groups (first BLOB PRIMARY KEY, size INT, place INT, given INT) WITHOUT ROWID;
    INSERT INTO groups SELECT first, count(*), NULL, NULL FROM prompts GROUP BY first ORDER BY first;
    UPDATE groups SET given = said.given, place = said.given FROM
        (SELECT first, min(given) AS given FROM rows JOIN prompts USING (prompt) WHERE given NOT NULL GROUP BY first)
        AS said WHERE said.first = groups.first;
"""
FATES_OF_ROWS = f"""
    UPDATE groups SET place = {TRAIN} WHERE place IS NULL;
    UPDATE rows SET fate = (
        SELECT CASE WHEN rows.given = place THEN place
                    WHEN rows.given IS NULL AND (groups.given IS NULL OR place = {TRAIN}) THEN place
                    ELSE {LEAK} + place END
        FROM prompts JOIN groups USING (first) WHERE prompts.prompt = rows.prompt);
    UPDATE rows SET fate = {FATES.index("duplicate")} WHERE fate <= {TRAIN} AND number NOT IN
        (SELECT min(number) FROM rows WHERE fate <= {TRAIN} GROUP BY kind, content);
"""


class DrawnShare(NamedTuple):
    """How many train rows of a kind a source gives: of weight and rows at most one; neither: all."""

    weight: float | None = None
    rows: int | None = None


class RowPlaces:
    """The rows of all sources, added one by one in their order, and then what becomes of each.

    Args:
        path: of the database, a file that does not exist yet; whoever made it removes it.
    """

    def __init__(self, path: Path) -> None:
        self.database = sqlite3.connect(path, isolation_level=None)
        self.database.execute("PRAGMA page_size = 1024")
        self.database.execute(f"PRAGMA cache_size = {PAGES_IN_MEMORY}")
        self.database.executescript(TABLES)
        self.database.execute("BEGIN")
        self.database.create_function("draw", 2, draw_digest, deterministic=True)
        self._last = b""

    def __enter__(self) -> "RowPlaces":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.database.close()

    def add(self, source: int, kind: Kind, split: Split | None, digests: list[bytes], content: bytes) -> None:
        """One more row.

        Args:
            source: its place among the sources.
            split: where its source says that it goes, if it says so.
            digests: of its prompt's beginnings, the whole one last (`prompt_digests`).
            content: `content_digest` of it.
        """
        *shorter, prompt = digests
        given = None if split is None else PLACES.index(split)
        values = (source, KINDS.index(kind), given, prompt, content)
        self.database.execute("INSERT INTO rows VALUES (NULL, ?, ?, ?, ?, ?, NULL)", values)
        if shorter and prompt != self._last:
            entries = [(prompt, position, beginning) for position, beginning in enumerate(shorter)]
            self.database.executemany("INSERT INTO beginnings VALUES (?, ?, ?)", entries)
        self._last = prompt

    def divide(self, fractions: Mapping[Split, float]) -> None:
        """Steps 1 to 3. Raises StageError if the prompts without a split are too few to be divided."""
        self._run(GROUPS)
        ((free, groups),) = self.database.execute("SELECT total(size), count(*) FROM groups WHERE place IS NULL")
        wanted = [split for split in PLACES if fractions.get(split, 0) > 0]
        if groups and groups <= len(wanted):
            found = (
                f"{int(free)} distinct prompt{'' if free == 1 else 's'} in {groups} group{'' if groups == 1 else 's'}"
            )
            raise StageError(
                f"{found} cannot be divided among {' and '.join(['train', *wanted])}, which need at least one each; "
                "give more rows, or set the fraction of what is held out to 0"
            )
        for later, split in zip(range(len(wanted), 0, -1), wanted, strict=True):
            if groups:
                self._hold_out(split, max(1, round(fractions[split] * free)), later)
        self._run(FATES_OF_ROWS)

    def _hold_out(self, split: Split, room: int, later: int) -> None:
        """Give a split groups of about `room` prompts, in the order of their digests; `later` groups stay at least.

        A group that is larger than what the split still lacks is passed over. So the split has its size unless all
        groups are larger; then it gets the smallest one.
        """
        ((groups,),) = self.database.execute("SELECT count(*) FROM groups WHERE place IS NULL")
        taken = []
        for first, size in self.database.execute("SELECT first, size FROM groups WHERE place IS NULL ORDER BY first"):
            if size <= room and len(taken) < groups - later:
                taken.append((PLACES.index(split), first))
                room -= size
            if not room:
                break
        if not taken:
            smallest = "SELECT first FROM groups WHERE place IS NULL ORDER BY size, first LIMIT 1"
            taken = [(PLACES.index(split), first) for (first,) in self.database.execute(smallest)]
        self.database.executemany("UPDATE groups SET place = ? WHERE first = ?", taken)

    def leave_out(self, numbers: Iterable[int], reason: str) -> None:
        """Leave out rows by their numbers, counted from 0 in the order in which they were added."""
        entries = ((FATES.index(reason), number + 1) for number in numbers)
        self.database.executemany("UPDATE rows SET fate = ? WHERE number = ?", entries)

    def draw(self, shares: Mapping[int, DrawnShare], names: Collection[str], seed: int) -> None:
        """Step 4, by the share of each source. `names` are those of the sources, in their order."""
        named = list(names)
        counts = self.counts()
        for kind in range(len(KINDS)):
            there = {source: counts[source, kind, TRAIN] for source in shares if counts[source, kind, TRAIN]}
            for source, size in sizes_of_shares(there, shares).items():
                if size < there[source]:
                    self.database.execute(
                        f"UPDATE rows SET fate = {FATES.index('not_drawn')} "
                        f"WHERE source = ? AND kind = ? AND fate = {TRAIN} AND number NOT IN (SELECT number FROM rows "
                        f"WHERE source = ? AND kind = ? AND fate = {TRAIN} ORDER BY draw(?, content), number LIMIT ?)",
                        (source, kind, source, kind, f"{seed} {named[source]}", size),
                    )

    def counts(self) -> Counter[tuple[int, int, int]]:
        """(source, kind, fate) → rows."""
        found = self.database.execute("SELECT source, kind, fate, count(*) FROM rows GROUP BY source, kind, fate")
        return Counter({(source, kind, fate): count for source, kind, fate, count in found})

    def fates(self) -> Iterator[str]:
        """What becomes of each row, in the order of adding them: a split, or the reason why it is left out."""
        return (FATES[fate] for (fate,) in self.database.execute("SELECT fate FROM rows ORDER BY number"))

    def _run(self, statements: str) -> None:
        for statement in statements.split(";"):
            self.database.execute(statement)


def draw_digest(key: str, content: bytes) -> bytes:
    """By what the rows of a source are drawn: 16 bytes, uniform, in another order for another key."""
    return hashlib.blake2b(content, digest_size=16, key=hashlib.blake2b(key.encode()).digest()).digest()


def sizes_of_shares(there: Mapping[int, int], shares: Mapping[int, DrawnShare]) -> dict[int, int]:
    """How many rows of a kind each source gives: the largest mixture in these weights that repeats no row.

    With n rows of a source of weight w the mixture has at most n / w rows for each unit of weight: the least of these
    ratios, r, is that of the source used up, and each gives ⌊r w⌋. A source with a number of rows gives so many, or all
    that it has if they are fewer; one with neither gives all.

    Args:
        there: source → train rows that it has, at least 1.
    """
    weights = {source: Fraction(weight) for source in there if (weight := shares[source].weight) is not None}
    ratio = min((there[source] / weight for source, weight in weights.items()), default=Fraction(0))
    sizes = dict(there)
    for source in there:
        rows = shares[source].rows
        if source in weights:
            sizes[source] = int(ratio * weights[source])
        elif rows is not None:
            sizes[source] = min(rows, there[source])
    return sizes
