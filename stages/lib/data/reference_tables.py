"""Tables of reference log-probs: what each was made from, and whether it still holds that.

A table that does not belong to the tokens or the model beside it trains a policy towards nonsense, and no loss tells.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stages.lib.command.errors import StageError
from stages.lib.data.token_tables import REFERENCE_SCHEMA, read_note, read_table

if TYPE_CHECKING:
    from datasets import Dataset

VALUES = "values"  # the note of their digest
MODEL_PATH = "model_path"  # the note of where the reference lay
LOG_PROBS = ("reference_chosen_logps", "reference_rejected_logps")
OTHER = {"tokens": "other tokens", "model": "another model"}
AGAIN = "run the stage ref_logprobs again"


def read_reference(path: Path, tokens: "Dataset", tokens_path: Path) -> "Dataset":
    """A table of reference log-probs, of the same rows as a table of preference tokens.

    Raises:
        StageError: it is of other rows, its values are not those that were written, or `read_table` refuses it.
    """
    table = read_table(path, REFERENCE_SCHEMA)
    if read_note(path, VALUES) != values_digest(*(table.data.column(name).to_numpy() for name in LOG_PROBS)):
        raise StageError(f"{path} does not hold the values that were written to it: it was changed or damaged; {AGAIN}")
    if tokens["row"][:] != table["row"][:]:
        raise StageError(f"{path} was made from other rows than {tokens_path}; {AGAIN}")
    return table


def values_digest(chosen: Sequence[float], rejected: Sequence[float]) -> str:
    """SHA-256 of the log-probs of a table, in float32."""
    columns = [np.asarray(column, dtype="<f4").tobytes() for column in (chosen, rejected)]
    return hashlib.sha256(b"".join(columns)).hexdigest()


def require_made_from(path: Path, **inputs: tuple[Path, str]) -> None:
    """Raise StageError if a table notes another hash of `tokens` or `model` than (where that lies, its hash now)."""
    for note, (source, digest) in inputs.items():
        if read_note(path, note) != digest:
            raise StageError(f"{path} was made from {OTHER[note]} than {source} holds now; {AGAIN}")
