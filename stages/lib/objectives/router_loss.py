"""A load-balancing loss on the routers of a mixture of experts, added to any objective.

    L = L_objective + α B,    B = 1/|layers| Σ_layers N Σ_i f_i P_i

with N experts, f_i the share of tokens that chose expert i, and P_i the mean of its gate probability (the softmax of
the router's logits), both over the same T tokens (Switch Transformer, arXiv 2101.03961, Eq 4 to 6). Where a token
chooses k experts the f_i of a layer add up to k, so B is k where all are balanced. transformers scales its loss alike,
but takes the means over layers before the product, so that one layer may make up for another. The gradient is that of
P; f counts. Padding is no token.

The T tokens are those of a sequence, and B is the mean over the sequences of the optimizer step; or they are all tokens
of the step (arXiv 2501.11873, section 3). A mean over micro-batches would be neither, and would depend on how they are
cut: where f goes up in a part, so does P, and the mean of their products is larger than the product of their means.

For the whole step f must be known before the first gradient, so a pass without gradient, and without the head, goes
first. The paper's buffer spares it by counting the micro-batches seen so far, which is an approximation: the first one
would be balanced by itself, and where a row stands would matter.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional

from stages.lib.command.errors import StageError
from stages.lib.compute.batching import MicroBatching, SequenceBatch
from stages.lib.models.attention_masks import PARTS, PROMPT
from stages.lib.models.routing import Routing, recorded_routing, routers
from stages.lib.models.token_logprobs import at_least_float32
from stages.lib.objectives.objective import AltersInputs, KeepsState, Mean, Objective, PassSums, Rows, summed
from stages.lib.settings.router_loss import RouterLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METRICS = ("router_loss", "most_loaded_expert")
UNITS = {"sequence": "sequences", "batch": "batches"}  # what the metrics are means over


class ExpertLoads(NamedTuple):
    """Sums over the tokens of n sequences (or of one batch), in each layer, for each expert."""

    counts: torch.Tensor  # (n, layers, experts), how many tokens chose it; no gradient
    probabilities: torch.Tensor  # (n, layers, experts), with gradient
    tokens: torch.Tensor  # (n,)


def load_balancing_losses(loads: ExpertLoads) -> torch.Tensor:
    """B of each sequence: N Σ_i f_i P_i, a mean over layers. Returns (n,); 0 where there is no token."""
    tokens = loads.tokens.clamp(min=1)[:, None, None]
    products = (loads.counts / tokens) * (loads.probabilities / tokens)
    return products.shape[-1] * products.sum(dim=-1).mean(dim=-1)


def largest_shares(counts: torch.Tensor) -> torch.Tensor:
    """The part of all choices that fell on the most chosen expert, a mean over layers. (n, layers, experts) → (n,)."""
    return (counts.amax(dim=-1) / counts.sum(dim=-1).clamp(min=1)).mean(dim=-1)


def parts_of_step(loads: ExpertLoads, step: ExpertLoads) -> tuple[torch.Tensor, torch.Tensor]:
    """What a pass over n sequences adds to B of the whole step, whose counts are known, and to its largest share.

    B is linear in P, and P is a sum over passes. Returns (1,), (1,).
    """
    probabilities = loads.probabilities.sum(dim=0, keepdim=True)
    losses = load_balancing_losses(ExpertLoads(step.counts, probabilities, step.tokens))
    return losses, largest_shares(step.counts) * loads.tokens.sum() / step.tokens


def expert_loads(routings: list[Routing], members: torch.Tensor) -> ExpertLoads:
    """What each of n sequences asks of the experts.

    Args:
        routings: of each layer.
        members: which of the tokens of the pass are the sequence's, (n, tokens).
    """
    gates = [at_least_float32(routing.logits).softmax(dim=-1) for routing in routings]
    members = members.to(gates[0].dtype)
    probabilities = [members @ of_layer for of_layer in gates]
    counts = [
        members @ functional.one_hot(routing.experts, of_layer.shape[-1]).sum(dim=1).to(of_layer.dtype)
        for routing, of_layer in zip(routings, gates, strict=True)
    ]
    return ExpertLoads(torch.stack(counts, dim=1), torch.stack(probabilities, dim=1), members.sum(dim=1))


def members_of_sequences(batch: SequenceBatch) -> torch.Tensor:
    """Which of the flattened ids are tokens of each sequence, and no padding. Shape: (n, tokens), of truth values.

    A prompt that two replies share is part of both sequences (`compute/row_layouts.py`).
    """
    ends = batch.end_mask.flatten()
    if ends.dtype == torch.bool:
        sequences = ends.cumsum(dim=0) - ends.long()
        numbers = torch.arange(len(batch.completion_lengths), device=ends.device)
        members = sequences == numbers[:, None]
        return members if batch.attention_mask is None else members & batch.attention_mask.flatten()
    assert batch.attention_mask is not None, "rows with shared prompts have parts"
    parts = batch.attention_mask.flatten()
    rows = torch.arange(len(parts), device=parts.device) // batch.input_ids.shape[1]
    last = (ends > 0).nonzero()[:, 0]
    last = last[ends[last].argsort(), None]
    of_prompt = (parts % PARTS == PROMPT) & (parts // PARTS == parts[last] // PARTS)
    return (rows == rows[last]) & ((parts == parts[last]) | of_prompt)


def router_columns(settings: RouterLoss | None) -> tuple[str, ...]:
    """What a curve gets besides, where settings ask for the loss."""
    return () if settings is None else (*METRICS, *(f"validation/{name}" for name in METRICS))


def with_router_loss(
    objective: Objective, settings: RouterLoss | None, model: "PreTrainedModel", sequences_of_row: int, where: str
) -> Objective:
    """The objective with the loss of the routers of `model` added, where settings ask for it.

    Args:
        sequences_of_row: how many sequences the policy reads of each row of the table.
        where: the entry of params.yaml, for the message.
    Raises:
        StageError: the model has no router.
    """
    if settings is None:
        return objective
    if not routers(model):
        raise StageError(
            f"params.yaml: {where}.router_loss: {type(model).__name__} has no router that transformers knows; set null"
        )
    return RoutedObjective(objective, settings, model, sequences_of_row)


class WatchedModule:
    """A module whose pass over one batch is looked into; other passes, and whatever else it has, go straight to it."""

    def __init__(self, module: Any, model: "PreTrainedModel", batch: SequenceBatch) -> None:
        self.module = module
        self.model = model
        self.batch = batch
        self.seen: ExpertLoads | None = None

    @property
    def loads(self) -> ExpertLoads:
        """What the sequences of the batch have asked of the experts."""
        assert self.seen is not None, "an objective passes the ids of its batch to the module"
        return self.seen

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        if inputs[0] is not self.batch.input_ids:
            return self.module(*inputs, **options)
        with recorded_routing(self.model) as routings:
            output = self.module(*inputs, **options)
        self.seen = expert_loads(routings, members_of_sequences(self.batch))
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class RoutedObjective:
    """Another objective and α B; "loss" among the metrics stays the other's own.

    The routers are read in the objective's own pass over a batch: once for each pass of the policy, never in one of a
    reference.
    """

    def __init__(
        self, objective: Objective, settings: RouterLoss, model: "PreTrainedModel", sequences_of_row: int
    ) -> None:
        self.objective = objective
        self.settings = settings
        self.model = model
        self.sequences_of_row = sequences_of_row
        self.metrics = {**objective.metrics, **dict.fromkeys(METRICS, Mean(UNITS[settings.over]))}
        self.of_step: ExpertLoads | None = None  # n = 1, the counts of the whole step

    @property
    def batching(self) -> MicroBatching:
        return self.objective.batching

    def batches(self, rows: Rows) -> Iterator[SequenceBatch]:
        self.of_step = None
        yield from self.objective.batches(rows)

    def sums(self, module: Any, batch: SequenceBatch, rows: Rows) -> PassSums:
        if self.settings.over == "batch" and self.of_step is None:
            self.of_step = self._counted(module, rows, train=torch.is_grad_enabled())
        watched = WatchedModule(module, self.model, batch)
        loss, metrics = self.objective.sums(watched, batch, rows)
        if self.of_step is None:
            losses, shares = load_balancing_losses(watched.loads), largest_shares(watched.loads.counts)
        else:
            losses, shares = parts_of_step(watched.loads, self.of_step)
        denominators = self.denominators(rows)
        scale = denominators[self.metrics["loss"].over] / denominators[UNITS[self.settings.over]]
        loss = loss + self.settings.coefficient * scale * losses.sum()
        return PassSums(loss, torch.cat([metrics, summed(losses, shares)]))

    @torch.no_grad()
    def _counted(self, module: Any, rows: Rows, *, train: bool) -> ExpertLoads:
        """The choices of all tokens of the step, over all processes; probabilities are not summed up."""
        altered = self.objective.altered if train and isinstance(self.objective, AltersInputs) else None
        own: list[ExpertLoads] = []
        for batch in self.objective.batches(rows):
            watched = WatchedModule(module, self.model, batch)
            with altered(module, batch, rows) if altered else nullcontext():
                watched(*batch.inputs, torch.zeros_like(batch.completion_mask))  # an empty mask: no work for the head
            own.append(watched.loads)
        counts = torch.cat([loads.counts for loads in own]).sum(dim=0, keepdim=True)
        tokens = torch.cat([loads.tokens for loads in own]).sum()
        sums = self.batching.processes.sum([*counts.flatten().tolist(), float(tokens)])
        of_all = torch.tensor(sums, dtype=counts.dtype, device=counts.device)
        return ExpertLoads(of_all[:-1].view_as(counts), torch.zeros_like(counts), of_all[-1:])

    def denominators(self, rows: Rows) -> Mapping[str, int]:
        sequences = self.sequences_of_row * len(next(iter(rows.values())))
        return {**self.objective.denominators(rows), "sequences": sequences, "batches": 1}

    def units(self, rows: Rows) -> int:
        return self.objective.units(rows)

    def state_dict(self) -> dict[str, Any]:
        return self.objective.state_dict() if isinstance(self.objective, KeepsState) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if isinstance(self.objective, KeepsState):
            self.objective.load_state_dict(state)
