"""Whether a table of reference log-probs is what a policy starts with.

One of another model, or of other tokens, trains a policy towards nonsense, and no loss tells.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stages.lib.command.errors import StageError
from stages.lib.compute.batching import MicroBatching
from stages.lib.compute.sequence_logprobs import all_pair_logps
from stages.lib.data.reference_tables import AGAIN, LOG_PROBS

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


def mean_margin(policy: Callable, pairs: dict[str, list[Any]], batching: MicroBatching) -> float:
    """The mean over pairs of |h|, in nats: how far a policy is from its reference. Arguments as for `require_start`."""
    chosen, rejected = log_ratios(policy, pairs, batching)
    return float((chosen - rejected).abs().mean())


def mean_chosen_logp(policy: Callable, pairs: dict[str, list[Any]], batching: MicroBatching) -> float:
    """The mean log-prob of the chosen replies of some pairs, in nats a reply. Arguments as for `require_start`."""
    return float(all_pair_logps(policy, pairs, batching).chosen.double().mean())


def log_ratios(
    policy: Callable, pairs: dict[str, list[Any]], batching: MicroBatching
) -> tuple[torch.Tensor, torch.Tensor]:
    """Δ = log π − log π_ref of the chosen replies and of the rejected ones, in nats. Shapes: (n,), (n,)."""
    chosen, rejected = (
        own.double() - torch.tensor(pairs[name], dtype=torch.float64)
        for own, name in zip(all_pair_logps(policy, pairs, batching), LOG_PROBS, strict=True)
    )
    return chosen, rejected


def rounding(precision: str, tokens: float, size: float) -> float:
    """The limit above for log-probs of so many `tokens` that add up to `size` nats."""
    if precision == "bf16":
        return BF16_LIMIT_PER_ROOT_TOKEN * tokens**0.5
    return max(FP32_LIMIT, LAST_PLACES * torch.finfo(torch.float32).eps * size)
