"""A reward model's scores of whole sequences, each a prompt and a completion that ends it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from stages.lib.compute.batching import MicroBatching


class PairScores(NamedTuple):
    """Scores of replies to the same prompts."""

    chosen: list[float]
    rejected: list[float]


@torch.no_grad()
def all_scores(
    scorer: Callable, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], batching: MicroBatching
) -> list[float]:
    """The score of each completion, in the order given, in all processes.

    What comes several times is scored once: in another place of a pass it would have a score with other last digits.

    Args:
        scorer: a `SequenceScores` module, or an engine around one.
        prompts, completions: token ids, the same in all processes.
    """
    places: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    pairs = zip(prompts, completions, strict=True)
    place_of = [places.setdefault((tuple(prompt), tuple(reply)), len(places)) for prompt, reply in pairs]
    different = ([prompt for prompt, _ in places], [reply for _, reply in places])

    def passes() -> dict[int, float]:
        found = {}
        for batch in batching.sequences(*different):
            found |= dict(zip(batch.rows, scorer(*batch.inputs, batch.end_mask).tolist(), strict=True))
        return found

    scores = batching.processes.gather_rows(batching.budget.attempt(passes))
    return [scores[place] for place in place_of]


@torch.no_grad()
def all_pair_scores(scorer: Callable, pairs: dict[str, list], batching: MicroBatching) -> PairScores:
    """The scores of both completions of every pair, in the order given, in all processes.

    Args:
        scorer: as for `all_scores`.
        pairs: columns of the preference token table, the same in all processes.
    """

    def passes() -> dict[int, tuple[float, float]]:
        found = {}
        for batch in batching.pairs(pairs["prompt_ids"], pairs["chosen_ids"], pairs["rejected_ids"]):
            chosen, rejected = scorer(*batch.inputs, batch.end_mask).tensor_split(2)
            found |= dict(zip(batch.rows, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True))
        return found

    chosen, rejected = zip(*batching.processes.gather_rows(batching.budget.attempt(passes)), strict=True)
    return PairScores([*chosen], [*rejected])
