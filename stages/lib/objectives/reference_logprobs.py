"""Tables of reference log-probs: what each was made from, and whether it holds what a policy starts with.

A table that does not belong to the tokens or the model beside it trains a policy towards nonsense, and no loss tells.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stages.lib.command.errors import StageError
from stages.lib.compute.batching import MicroBatching
from stages.lib.compute.sequence_logprobs import all_pair_logps
from stages.lib.data.token_tables import REFERENCE_SCHEMA, read_note, read_table

if TYPE_CHECKING:
    from datasets import Dataset

VALUES = "values"  # the note of their digest
LOG_PROBS = ("reference_chosen_logps", "reference_rejected_logps")
OTHER = {"tokens": "other tokens", "model": "another model"}
AGAIN = "run the stage ref_logprobs again"

# How far rounding alone may move the mean over pairs of a log-prob, or of the difference of two, in nats.
#
# fp32: 1e-3, but for sums so long that their last place is larger. bf16: so much times the square root of the number of
# tokens, as roundings add up in a random walk.
#
# Measured on 16 pairs of random tokens, with completions of 8 to 32 and of 512 to 700 tokens: padded one by one, padded
# in two sizes of micro-batch, and packed, any two of these compared; under Llamas with random weights (256 wide with 6
# layers, 512 with 4) and under stories260K, to which random tokens come as a surprise of 18 nats each. In bf16 the
# margins differ by up to 1.6 nats for 1,200 tokens, 0.045 times their root, and the chosen replies by 0.030 times; in
# fp32 by up to 5.5e-4 for sums of -10,800 nats, and 1e-5 for those of -350. A base in 4 bits computes in one of these
# two precisions, on the same weights each time, and so has no limit of its own.
FP32_LIMIT = 1e-3
LAST_PLACES = 2.0
BF16_LIMIT_PER_ROOT_TOKEN = 0.1


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


def require_start(
    policy: Callable, pairs: dict[str, list[Any]], batching: MicroBatching, path: Path, precision: str
) -> None:
    """Raise StageError unless an untrained policy gives these pairs the log-probs of the table, but for rounding.

    Compared are the means of |h| (h = Δ_chosen − Δ_rejected, Δ = log π − log π_ref) and, since a shift of both cancels
    in h, of |Δ_chosen|. All processes call it together.

    Args:
        policy: as for `all_pair_logps`.
        pairs: columns of the preference tokens and of the table.
    """
    logps = all_pair_logps(policy, pairs, batching)
    chosen, rejected = (
        own.double() - torch.tensor(pairs[name], dtype=torch.float64)
        for own, name in zip(logps, LOG_PROBS, strict=True)
    )
    lengths = [sum(map(len, pairs[name])) / len(chosen) for name in ("chosen_ids", "rejected_ids")]
    sums = [float(own.abs().mean()) for own in logps]
    for name, differences, tokens, size in (
        ("the margin of a pair", chosen - rejected, sum(lengths), sum(sums)),
        ("the log-prob of a chosen reply", chosen, lengths[0], sums[0]),
    ):
        found, limit = float(differences.abs().mean()), rounding(precision, tokens, size)
        if not found <= limit:
            raise StageError(
                f"{path}: before the first update {name} is {found:.3g} nats from the reference's, and rounding in "
                f"{precision} explains {limit:.2g}: these are not the log-probs of this model on these tokens in this "
                f"precision; {AGAIN}"
            )


def rounding(precision: str, tokens: float, size: float) -> float:
    """The limit above for log-probs of so many `tokens` that add up to `size` nats."""
    if precision == "bf16":
        return BF16_LIMIT_PER_ROOT_TOKEN * tokens**0.5
    return max(FP32_LIMIT, LAST_PLACES * torch.finfo(torch.float32).eps * size)
