"""What becomes of the columns of raw rows: renamed, ignored by name, read by the format, or not read.

A column or a key of a message that would change what the data says, and that nothing reads, is an error until it is
ignored by name. Others that nothing reads, such as an id, are told in one line.
"""

from collections.abc import Iterable
from typing import Any

from stages.lib.command.errors import StageError, one_line
from stages.lib.command.quoted import nearest
from stages.lib.data.conversations import READ_KEYS, MalformedRowError
from stages.lib.data.formats import AS_THEY_ARE, COLUMNS, PAIRS, READERS, REPLIES, Format, columns_read, picked_facts
from stages.lib.data.raw_rows import RawRow
from stages.lib.data.readers.prompt_and_reply import COLUMNS_OF_PROMPTS
from stages.lib.data.readers.reply_trees import DELETED
from stages.lib.data.readers.row_place import is_given, unread_value
from stages.lib.settings.reading import ReadingOptions, TreeComparison

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
        "kto_tag",
        "weight",
        "label",
        "score",
        "scores",
        "rating",
        "ratings",
        "rank",
        "ranks",
        "votes",
        "choices",
        "options",
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
# Columns that may hold the reply where a format reads none of them.
NAMES_OF_REPLIES = ("completion", "output", "answer", "response", "reply")
JUDGEMENTS = ("score", "scores", "rating", "ratings", "rank", "ranks", "votes")
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
        facts: own columns that ride on as facts.
        options: how rows are read beyond their format: they name columns, too.
        place: of the source in params.yaml, for messages.
    """

    def __init__(
        self,
        renames: dict[str, str],
        ignored: tuple[str, ...] = (),
        facts: tuple[str, ...] = (),
        options: ReadingOptions = AS_THEY_ARE,
        place: str = "sources",
    ) -> None:
        self.renames, self.ignored, self.facts = renames, frozenset(ignored), facts
        self.options, self.place = options, place
        compared = columns_read("comparison", options) if options.comparison is not None else frozenset()
        self.named = COLUMNS | compared  # what a reader may look at
        self.inner = [name for name in sorted({*renames, *facts, *compared}) if "." in name]
        self.own: set[str] = set()
        self.ours: set[str] = set()
        self.keys: set[str] = set()

    def take(self, row: RawRow, where: str) -> tuple[RawRow, dict[str, Any]]:
        """The row with our names for its columns and without those ignored, and its facts.

        Raises:
            StageError: a column gets the name of another one that the row has.
            MalformedRowError: the row lacks a column to rename that not every row may lack, or one of the facts.
        """
        row = with_inner_columns(row, self.inner)
        self.own.update(row)
        taken = {}
        for own, value in row.items():
            ours = self.renames.get(own, own)
            if own in self.ignored or (own in self.facts and ours not in self.named):
                continue
            if ours in taken:
                raise StageError(
                    f"{where}: by {self.place}.columns two columns are named '{ours}', one of them from the start; "
                    f"rename that one, too, or put it into {self.place}.ignore_columns"
                )
            taken[ours] = value
        for own, ours in self.renames.items():
            if own not in row and ours not in OPTIONAL_COLUMNS:
                found = ", ".join(row) or "none"
                raise MalformedRowError(f"{where}: no column '{own}' to rename, found {found}", "missing_column")
        self.ours.update(taken)
        return taken, picked_facts(row, self.facts, where)

    def refuse_unread(self, row: RawRow, name: Format, where: str) -> None:
        """Raise a StageError if the row says something that format `name` does not read (see the lists above)."""
        read = columns_read(name, self.options)
        known = {self.renames.get(own, own) for own in self.facts}
        for column in sorted(row.keys() & MEANINGFUL_COLUMNS - read - known):
            if is_given(row[column]):
                what = f"{where}: the column '{column}' (format '{name}')"
                raise StageError(unread_value(what, column, how_to_read(column, name)))
        for column in sorted(row.keys() & read):
            for number, message in enumerate(messages_in(row[column]), start=1):
                if not {"role", "from"} & message.keys():
                    continue
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
                        f"{self.place}.{setting} names '{name}', which no row has{nearest(name, sorted(known))}"
                    )

    def unread_reply(self, name: Format) -> str:
        """What to say where no row had a reply, and a column that format `name` does not read may hold it."""
        unread = sorted(self.ours.intersection(NAMES_OF_REPLIES) - columns_read(name, self.options) - {*self.facts})
        prompts = [column for column in READERS[name].columns if column in COLUMNS_OF_PROMPTS]
        if not unread or not prompts:
            return ""
        own = {ours: own for own, ours in self.renames.items()}
        renamed = [(own.get(prompts[0], prompts[0]), "prompt"), (own.get(unread[0], unread[0]), "completion")]
        columns = ", ".join(f"{own}: {ours}" for own, ours in renamed if own != ours)
        return one_line(
            f"; the column '{unread[0]}', which format {name} does not read, may hold the reply: columns: "
            f"{{{columns}}} reads it after its prompt"
        )

    def summary(self, name: Format) -> list[str]:
        """A line each of which columns and keys of messages were read, and which not."""
        read = columns_read(name, self.options)
        renamed = {ours: f"{ours} (from {own})" for own, ours in self.renames.items()}
        parts = {
            "columns read": {renamed.get(ours, ours) for ours in self.ours & read},
            "facts": set(self.facts),
            "not read": {renamed.get(ours, ours) for ours in self.ours - read - {*self.facts}},
            "ignored by name": (self.own | self.keys) & self.ignored,
            "keys of messages not read": self.keys - READ_KEYS - keys_compared(self.options) - self.ignored,
        }
        return [one_line(f"{what}: {', '.join(sorted(names))}") for what, names in parts.items() if names]


def how_to_read(column: str, name: Format) -> str:
    """The beginning of advice on a column that judges replies, which only to leave out would train on the bad ones."""
    if name in REPLIES and column == "kto_tag":
        return "columns: {kto_tag: label} reads it as the label that tells good replies from bad ones; "
    if name in REPLIES and column in JUDGEMENTS:
        return f"threshold (score: {column}) makes of it the label that tells good replies from bad ones; "
    if name in PAIRS and column in (*JUDGEMENTS, "label"):
        return "if it says which of the two replies is better, describe it in comparison; "
    return ""


def keys_compared(options: ReadingOptions) -> set[str]:
    """The keys of responses that a comparison reads."""
    comparison = options.comparison
    names = ("text_key", "role_key", "replies_key", "rank_key", "score_key", "id_key", "parent_key")
    keys = {getattr(comparison, name, None) for name in names} | (
        {DELETED} if isinstance(comparison, TreeComparison) else set()
    )
    return {key for key in keys if key is not None}


def with_inner_columns(row: RawRow, names: Iterable[str]) -> RawRow:
    """The row with a column for each name with dots that leads into objects, such as question.text.

    The other values of such an object become columns of the same kind, so that what is not read of it is told.
    """
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts)):
            outer = ".".join(parts[:end])
            if name not in row and isinstance(row.get(outer), dict):
                inner = {f"{outer}.{key}": value for key, value in row[outer].items()}
                row = {column: value for column, value in row.items() if column != outer} | inner
    return row


def messages_in(value: Any) -> list[dict[str, Any]]:
    """The objects of a value that may be a list of messages, a single one, an object with messages, or anything."""
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        value = value["messages"]
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]


def refuse_unknown_targets(renames: dict[str, str]) -> None:
    """Raise a ValueError if a column is to get a name that no format reads."""
    for own, ours in renames.items():
        if ours not in COLUMNS:
            raise ValueError(
                f"columns gives '{own}' the name '{ours}', which no format reads{nearest(ours, sorted(COLUMNS))}; "
                f"known: {', '.join(sorted(COLUMNS))}"
            )
