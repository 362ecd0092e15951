"""The pairs of a forward pass as a loss is to see them, from what the pass and the table say of each."""

import torch

from stages.lib.models.token_logprobs import TokenDetails
from stages.lib.objectives.objective import Rows
from stages.lib.objectives.pair_modifiers import discounted_sums, wpo_weights
from stages.lib.objectives.preference_losses import PairBatch, StepTies
from stages.lib.settings.preference_loss import PairLoss, discount_of_length, reads_reference

TOKENS_OF_REFERENCE = ("reference_chosen_token_logps", "reference_rejected_token_logps")


def pair_batch(chosen: torch.Tensor, rejected: torch.Tensor, places: list[int], rows: Rows) -> PairBatch:
    """What a loss needs of the pairs at these places of `rows`; `chosen` and `rejected` are the policy's log-probs.

    Rows without a reference have log-probs of 0 for it.
    """

    def column(name: str) -> torch.Tensor:
        if name not in rows:
            return torch.zeros_like(chosen, requires_grad=False)
        return torch.tensor([rows[name][place] for place in places], device=chosen.device)

    def lengths(name: str) -> torch.Tensor:
        return torch.tensor([len(rows[name][place]) for place in places], device=chosen.device)

    return PairBatch(
        chosen,
        rejected,
        column("reference_chosen_logps"),
        column("reference_rejected_logps"),
        lengths("chosen_ids"),
        lengths("rejected_ids"),
    )


def seen_by(loss: PairLoss, pairs: PairBatch, tokens: TokenDetails, places: list[int], rows: Rows) -> PairBatch:
    """The pairs with the reference, or none, and with the discount by length that a loss asks for.

    Args:
        tokens: of the replies of the n pairs, chosen ones first, 0 beyond an end: (2n, t).
        places: of the pairs in `rows`.
    """
    if not reads_reference(loss):
        nothing = torch.zeros_like(pairs.reference_chosen_logps)
        pairs = pairs._replace(reference_chosen_logps=nothing, reference_rejected_logps=nothing)
    alpha = discount_of_length(loss)
    if alpha == 1:
        return pairs
    lengths = (pairs.chosen_lengths, pairs.rejected_lengths)
    chosen, rejected = discounted_sums(*halves(tokens.logps), *lengths, alpha)
    pairs = pairs._replace(policy_chosen_logps=chosen, policy_rejected_logps=rejected)
    if not reads_reference(loss):
        return pairs
    columns = ([rows[name][place] for place in places] for name in TOKENS_OF_REFERENCE)
    of_chosen, of_rejected = (padded_rows(column, tokens.logps) for column in columns)
    chosen, rejected = discounted_sums(of_chosen, of_rejected, *lengths, alpha)
    return pairs._replace(reference_chosen_logps=chosen, reference_rejected_logps=rejected)


def padded_rows(lists: list[list[float]], like: torch.Tensor) -> torch.Tensor:
    """Lists of numbers as rows, 0 beyond each end: (n, columns of `like`), in float32."""
    result = torch.zeros((len(lists), like.shape[1]), device=like.device)
    for row, values in enumerate(lists):
        result[row, : len(values)] = torch.tensor(values)
    return result


def weights_by_wpo(pairs: PairBatch, tokens: TokenDetails) -> torch.Tensor:
    """WPO's weight of each pair, (n,), without gradient; `tokens` as for `seen_by`."""
    chosen, rejected = halves(tokens.logps)
    chosen_collisions, rejected_collisions = halves(tokens.log_collisions)
    lengths = (pairs.chosen_lengths, pairs.rejected_lengths)
    return wpo_weights(chosen, chosen_collisions, rejected, rejected_collisions, *lengths)


def halves(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(2n, t) → those of the chosen replies and those of the rejected ones, (n, t) each."""
    chosen, rejected = values.tensor_split(2)
    return chosen, rejected


def ties_of(ties: StepTies, places: list[int], like: torch.Tensor) -> StepTies:
    """The ties of some of the pairs of a step, on the device of `like` and in its precision."""

    def some(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[places].to(like)

    return ties._replace(beside_chosen=some(ties.beside_chosen), beside_rejected=some(ties.beside_rejected))
