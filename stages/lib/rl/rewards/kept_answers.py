"""What servers have answered, kept in the scratch folder, so that nothing is asked twice.

A killed run that is started again then sees the rewards that it saw, whatever the server would answer now. A key is a
hash of all that an answer depends on: what is asked, of which server by its name, and of which revision of what it
serves. The server's address does not count.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.operations.scratch_root import scratch_root

FILE = "answers.sqlite"
WAIT_SECONDS = 60.0  # for another stage that writes
KEYS_AT_A_TIME = 500


class KeptAnswers:
    """Answers, JSON values, by a hash of what was asked. All stages share them; only main processes use them.

    Args:
        path: of the file, which is made with the first answer; None: the scratch folder's.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or scratch_root() / FILE

    def find(self, keys: Sequence[str]) -> dict[str, Any]:
        """The answers that are there, by their keys."""
        if not self.path.exists():
            return {}
        found: dict[str, Any] = {}
        with self._opened() as database:
            for start in range(0, len(keys), KEYS_AT_A_TIME):
                some = keys[start : start + KEYS_AT_A_TIME]
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
                f"{self.path}, which keeps the answers of reward servers, cannot be used ({error}); remove it, and the "
                "servers are asked again"
            ) from None
