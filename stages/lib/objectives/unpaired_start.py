"""Whether a table of reference log-probs of single replies is what a policy starts with; compare `reference_start`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stages.lib.command.errors import StageError
from stages.lib.compute.batching import MicroBatching
from stages.lib.compute.sequence_logprobs import all_response_logps
from stages.lib.data.reference_tables import AGAIN
from stages.lib.objectives.reference_start import rounding


def require_unpaired_start(
    policy: Callable, replies: dict[str, list[Any]], batching: MicroBatching, path: Path, precision: str
) -> None:
    """Raise StageError unless an untrained policy gives these replies the log-probs of the table, but for rounding.

    Compared is the mean of |Δ|, Δ = log π − log π_ref. All processes call it together.

    Args:
        policy: as for `all_response_logps`.
        replies: columns of the unpaired tokens and of the table.
    """
    found, size = mean_log_ratio(policy, replies, batching), mean_size(replies)
    tokens = sum(map(len, replies["completion_ids"])) / len(replies["completion_ids"])
    limit = rounding(precision, tokens, size)
    if not found <= limit:
        raise StageError(
            f"{path}: before the first update the log-prob of a reply is {found:.3g} nats from the reference's, and "
            f"rounding in {precision} explains {limit:.2g}: these are not the log-probs of this model on these tokens "
            f"in this precision; {AGAIN}"
        )


def mean_log_ratio(policy: Callable, replies: dict[str, list[Any]], batching: MicroBatching) -> float:
    """The mean over replies of |Δ|, in nats: how far a policy is from its reference."""
    own = all_response_logps(policy, replies["prompt_ids"], replies["completion_ids"], batching)
    return float((own.double() - torch.tensor(replies["reference_logps"], dtype=torch.float64)).abs().mean())


def mean_size(replies: dict[str, list[Any]]) -> float:
    """The mean of |log π_ref(y|x)|, in nats."""
    return float(torch.tensor(replies["reference_logps"], dtype=torch.float64).abs().mean())
