"""What becomes of the columns of raw rows: renamed, ignored by name, read by the format, or not read.

A column or a key of a message that would change what the data says, and that nothing reads, is an error until it is
ignored by name. Others that nothing reads, such as an id, are told in one line.
"""

from typing import Any

from stages.lib.command.errors import StageError, one_line
from stages.lib.command.quoted import nearest
from stages.lib.data.conversations import READ_KEYS, MalformedRowError
from stages.lib.data.formats import COLUMNS, READERS, Format
from stages.lib.data.raw_rows import RawRow
from stages.lib.data.readers.row_place import is_given, unread_value

MESSAGE_COLUMNS = frozenset({"prompt", "chosen", "rejected", "completion", "messages", "conversations"})
OPTIONAL_COLUMNS = {column for reader in READERS.values() for column in reader.optional}
# Names with a meaning of their own in data for fine-tuning (TRL, OpenAI, LLaMA-Factory, Axolotl), by which a row says
# something else than its texts alone.
MEANINGFUL_COLUMNS = frozenset(
    {
        "system",
        "system_prompt",
        "history",
        "input",
        "margin",
        "label",
        "kto_tag",
        "weight",
        "score",
        "tools",
        "tool_calls",
        "functions",
        "function_call",
        "image",
        "images",
        "video",
        "videos",
        "audio",
        "audios",
        "chat_template_kwargs",
    }
)
MEANINGFUL_KEYS = frozenset(
    {
        "train",
        "loss",
        "tools",
        "refusal",
        "image",
        "images",
        "video",
        "videos",
        "audio",
        "audios",
    }
)


class RawColumns:
    """The columns of the rows of one reading, and the names that all of them had.

    Args:
        renames: own column: ours.
        ignored: own columns, and keys of messages, that are left out.
    """

    def __init__(self, renames: dict[str, str], ignored: tuple[str, ...]) -> None:
        self.renames, self.ignored = renames, frozenset(ignored)
        self.own: set[str] = set()
        self.ours: set[str] = set()
        self.keys: set[str] = set()

    def take(self, row: RawRow, where: str) -> RawRow:
        """The row with our names for its columns, and without those ignored.

        Raises:
            StageError: a column gets the name of another one that the row has.
            MalformedRowError: the row lacks a column to rename that not every row may lack.
        """
        self.own.update(row)
        taken = {}
        for own, value in row.items():
            ours = self.renames.get(own, own)
            if own in self.ignored:
                continue
            if ours in taken:
                raise StageError(
                    f"{where}: by prepare_data.columns two columns are named '{ours}', one of them from the start; "
                    "rename that one, too, or put it into prepare_data.ignore_columns"
                )
            taken[ours] = value
        for own, ours in self.renames.items():
            if own not in row and ours not in OPTIONAL_COLUMNS:
                found = ", ".join(row) or "none"
                raise MalformedRowError(f"{where}: no column '{own}' to rename, found {found}", "missing_column")
        self.ours.update(taken)
        return taken

    def refuse_unread(self, row: RawRow, name: Format, where: str) -> None:
        """Raise a StageError if the row says something that format `name` does not read (see the lists above)."""
        read = {*READERS[name].columns, *READERS[name].optional}
        for column in sorted(row.keys() & MEANINGFUL_COLUMNS - read):
            if is_given(row[column]):
                raise StageError(unread_value(f"{where}: the column '{column}' (format '{name}')", column))
        for column in sorted(row.keys() & read & MESSAGE_COLUMNS):
            for number, message in enumerate(messages_in(row[column]), start=1):
                self.keys.update(message)
                for key in sorted(message.keys() & MEANINGFUL_KEYS - self.ignored):
                    if is_given(message[key]):
                        place = f"{where}, '{column}', message {number}"
                        raise StageError(unread_value(f"{place}: the key '{key}'", key))

    def refuse_unseen(self) -> None:
        """Raise a StageError if a name of the settings was in no row: it would be a setting that nothing obeys."""
        for setting, names in (("columns", self.renames), ("ignore_columns", self.ignored)):
            known = self.own | (self.keys if setting == "ignore_columns" else set())
            for name in sorted(names):
                if name not in known:
                    raise StageError(
                        f"prepare_data.{setting} names '{name}', which no row has{nearest(name, sorted(known))}"
                    )

    def summary(self, name: Format) -> str:
        """One line that says which columns and keys of messages were read, and which not."""
        read = {*READERS[name].columns, *READERS[name].optional}
        parts = {
            "columns read": self.ours & read,
            "not read": self.ours - read,
            "ignored by name": (self.own | self.keys) & self.ignored,
            "keys of messages not read": self.keys - READ_KEYS - self.ignored,
        }
        told = [f"{what}: {', '.join(sorted(names))}" for what, names in parts.items() if names]
        return one_line(f"format {name}; {'; '.join(told)}")


def messages_in(value: Any) -> list[dict[str, Any]]:
    """The messages of a value that may be a list of them, a single one, or something else."""
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]


def refuse_unknown_targets(renames: dict[str, str]) -> None:
    """Raise a ValueError if a column is to get a name that no format reads."""
    for own, ours in renames.items():
        if ours not in COLUMNS:
            raise ValueError(
                f"columns gives '{own}' the name '{ours}', which no format reads{nearest(ours, sorted(COLUMNS))}; "
                f"known: {', '.join(sorted(COLUMNS))}"
            )
