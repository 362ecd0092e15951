"""Tables of reference log-probs: what each was made from, and whether it still holds that.

A table that does not belong to the tokens or the model beside it trains a policy towards nonsense, and no loss tells.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from stages.lib.command.errors import StageError
from stages.lib.data.mapped_table import MappedTable
from stages.lib.data.token_tables import (
    REFERENCE_SCHEMA,
    TOKEN_REFERENCE_SCHEMA,
    UNPAIRED_REFERENCE_SCHEMA,
    has_column,
    read_note,
    read_table,
)

VALUES = "values"  # the note of their digest
MODEL_PATH = "model_path"  # the note of where the reference lay
LOG_PROBS = ("reference_chosen_logps", "reference_rejected_logps")
# Where the table has them: of each token of `chosen_ids` and `rejected_ids`.
TOKEN_LOG_PROBS = ("reference_chosen_token_logps", "reference_rejected_token_logps")
# Of unpaired rows: of the reply, and of the reply to another prompt, null where a row has none.
UNPAIRED_LOG_PROBS = ("reference_logps", "reference_mismatched_logps")
OTHER = {"tokens": "other tokens", "model": "another model"}
AGAIN = "run the stage ref_logprobs again"


def read_reference(
    path: Path, tokens: MappedTable, tokens_path: Path, *, per_token_for: str | None = None
) -> MappedTable:
    """A table of reference log-probs, of the same rows as a table of preference tokens.

    Args:
        per_token_for: what needs the log-prob of each token, in the words of a message ("LD-DPO"); without it the
            columns of these, `TOKEN_LOG_PROBS`, are left out where the table has them.
    Raises:
        StageError: it lacks log-probs of tokens that are needed, it is of other rows, its values are not those that
            were written, or `read_table` refuses it.
    """
    per_token = has_column(path, TOKEN_LOG_PROBS[0])
    if per_token_for and not per_token:
        raise StageError(
            f"{path} has no log-probs of single tokens, which {per_token_for} needs: set params.yaml: "
            f"ref_logprobs.{path.parent.name}.per_token: true, and {AGAIN}"
        )
    table = read_table(path, TOKEN_REFERENCE_SCHEMA if per_token else REFERENCE_SCHEMA)
    require_values_written(path, table)
    require_same_rows(path, table, tokens, tokens_path)
    if per_token:
        require_as_many(path, table, tokens)
    return table if per_token_for else table.select_columns(["row", *LOG_PROBS])


def read_unpaired_reference(
    path: Path, tokens: MappedTable, tokens_path: Path, *, mismatched_for: str | None = None
) -> MappedTable:
    """A table of reference log-probs, of the same rows as a table of unpaired tokens.

    Args:
        mismatched_for: what needs the log-probs of the mismatched replies, in the words of a message.
    Raises:
        StageError: as `read_reference`; a row lacks the log-prob of its mismatched reply, or no row has such a reply.
    """
    table = read_table(path, UNPAIRED_REFERENCE_SCHEMA)
    require_values_written(path, table)
    require_same_rows(path, table, tokens, tokens_path)
    if mismatched_for:
        replies, logps = tokens.data.column("mismatched_ids"), table.data.column("reference_mismatched_logps")
        if replies.null_count == len(replies):
            raise StageError(
                f"{tokens_path}: all rows have one prompt, so none stands beside a reply to another one, which "
                f"{mismatched_for} needs"
            )
        if logps.null_count != replies.null_count:
            raise StageError(
                f"{path} has no log-probs of mismatched replies, which {mismatched_for} needs: set params.yaml: "
                f"ref_logprobs_unpaired.{path.parent.name}.mismatched: true, and {AGAIN}"
            )
    return table


def require_same_rows(path: Path, table: MappedTable, tokens: MappedTable, tokens_path: Path) -> None:
    if tokens["row"][:] != table["row"][:]:
        raise StageError(f"{path} was made from other rows than {tokens_path}; {AGAIN}")


def require_values_written(path: Path, table: MappedTable) -> None:
    """Raise StageError unless the values have the digest that their writer has noted."""
    columns = {name: table.data.column(name) for name in table.column_names if name != "row"}
    values = [pc.list_flatten(column) if name in TOKEN_LOG_PROBS else column for name, column in columns.items()]
    if read_note(path, VALUES) != values_digest(*(column.to_numpy() for column in values)):  # a null is NaN here
        raise StageError(f"{path} does not hold the values that were written to it: it was changed or damaged; {AGAIN}")


def require_as_many(path: Path, table: MappedTable, tokens: MappedTable) -> None:
    """Raise StageError unless each token of each reply has a log-prob."""
    for name, ids in zip(TOKEN_LOG_PROBS, ("chosen_ids", "rejected_ids"), strict=True):
        found, wanted = (pc.list_value_length(of.data.column(column)) for of, column in ((table, name), (tokens, ids)))
        row = pc.index(pc.not_equal(found, wanted), True).as_py()
        if row >= 0:
            raise StageError(
                f"{path}, row {table['row'][row]}, {name}: {found[row]} log-probs of {wanted[row]} tokens; {AGAIN}"
            )


def values_digest(*columns: Sequence[float] | np.ndarray) -> str:
    """SHA-256 of the log-probs of a table, in float32, column by column; of those of tokens, all in one sequence."""
    values = [np.asarray(column, dtype="<f4").tobytes() for column in columns]
    return hashlib.sha256(b"".join(values)).hexdigest()


def require_computed_alike(path: Path, precision: str, base_quantization: str | None, where: str) -> None:
    """Raise StageError if a table's numbers are not those of the policy before its first step.

    Args:
        precision, base_quantization: of the policy, which stands in params.yaml at `where`.
    """
    for reason, note, own in (
        ("precision is", "precision", precision),
        ("lora trains on base_quantization", "base_quantization", str(base_quantization)),
    ):
        reference = read_note(path, note)
        if reference != own:
            raise StageError(
                f"params.yaml: {where}: {reason} {own}, but {path.parent} was computed with {note} {reference}: the "
                "first step's margin would not be 0; give both the same"
            )


def require_made_from(path: Path, **inputs: tuple[Path, str]) -> None:
    """Raise StageError if a table notes another hash of `tokens` or `model` than (where that lies, its hash now)."""
    for note, (source, digest) in inputs.items():
        if read_note(path, note) != digest:
            raise StageError(f"{path} was made from {OTHER[note]} than {source} holds now; {AGAIN}")
