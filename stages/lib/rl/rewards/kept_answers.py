"""What servers have answered, kept in the scratch folder, so that nothing is asked twice.

A killed run that is started again then sees the rewards that it saw, whatever the server would answer now. A question's
identity is all that the answer depends on: what is asked, of which model or revision. Where the server is does not count.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import value_hash
from stages.lib.operations.scratch_root import scratch_root

FILE = "answers.sqlite"
WAIT_SECONDS = 60.0  # for another stage that writes
LARGEST_QUERY = 500  # keys that one statement names


class KeptAnswers:
    """Answers by the identity of a question. All stages of a project share them; only main processes use them.

    Args:
        path: of the file, which is made with the first answer; None: the scratch folder's.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or scratch_root() / FILE

    def find(self, questions: Sequence[Any]) -> dict[str, Any]:
        """The answers that are there, by `value_hash` of the question, a JSON-like value."""
        if not self.path.exists():
            return {}
        keys, found = [value_hash(question) for question in questions], {}
        with self._opened() as database:
            for start in range(0, len(keys), LARGEST_QUERY):
                some = keys[start : start + LARGEST_QUERY]
                places = ", ".join("?" * len(some))
                rows = database.execute(f"SELECT key, answer FROM answers WHERE key IN ({places})", some)
                found |= {key: json.loads(answer) for key, answer in rows}
        return found

    def add(self, answers: Mapping[str, Any]) -> dict[str, Any]:
        """Keep answers by their keys. Returns those that count: of two stages that ask at once, the first one's."""
        if not answers:
            return {}
        with self._opened() as database:
            rows = [(key, json.dumps(answer)) for key, answer in answers.items()]
            with database:
                database.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", rows)
            kept = {}
            for key in answers:
                ((answer,),) = database.execute("SELECT answer FROM answers WHERE key = ?", [key])
                kept[key] = json.loads(answer)
            return kept

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """The database, with its table. Raises StageError if it cannot be read or written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=WAIT_SECONDS)) as database:
                database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
                yield database
        except (sqlite3.Error, ValueError) as error:
            raise StageError(
                f"the kept answers of reward servers in {self.path} cannot be used ({error}); remove the file, and what "
                "is asked again is asked of the server"
            ) from None
