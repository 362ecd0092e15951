"""A reference that moves to the policy (TR-DPO, arXiv 2404.09656): θ_ref ← α θ + (1 − α) θ_ref every τ steps.

Until its first move it is the model that the policy starts from, whose log-probs are cached, and is not in memory. From
then on a second model gives the log-probs of each step's pairs, and of the validation pairs at each evaluation.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from stages.lib.compute.batching import MicroBatching
from stages.lib.compute.engine.base import Engine
from stages.lib.compute.frozen_model import fill, frozen
from stages.lib.compute.sequence_logprobs import all_pair_logps, all_pair_token_logps
from stages.lib.data.reference_tables import LOG_PROBS, TOKEN_LOG_PROBS
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.objectives.fit import Table
from stages.lib.objectives.objective import Rows
from stages.lib.settings.reference_sync import ReferenceSync

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LiveReference:
    """The reference once it has moved; part of a checkpoint.

    Its weights are kept in float32 in the main process, so that rounding to the module's numbers does not add up. All
    processes call its methods together.

    Args:
        load: the model that the policy started from, not to be trained.
        policy_weights: those of the policy as a model without adapters, by name, float32, in the main process.
        per_token: whether log-probs of single tokens are needed.
        say: told of the first move.
    """

    def __init__(
        self,
        settings: ReferenceSync,
        load: Callable[[], "PreTrainedModel"],
        policy: Engine,
        policy_weights: Callable[[], dict[str, torch.Tensor]],
        batching: MicroBatching,
        *,
        per_token: bool,
        say: Callable[[str], None],
    ) -> None:
        self.settings = settings
        self.load = load
        self.policy = policy
        self.policy_weights = policy_weights
        self.batching = batching
        self.per_token = per_token
        self.say = say
        self.model: PreTrainedModel | None = None  # None before the first move
        self.module: Callable | None = None  # that gives its log-probs
        self.weights: dict[str, torch.Tensor] = {}

    def after_step(self, step: int) -> None:
        """Move to the policy if that is due after a step (0-based)."""
        if (step + 1) % self.settings.every:
            return
        model = self._model()
        target = self.policy_weights()
        if self.policy.processes.is_main:
            for name, weight in target.items():
                own = self.weights[name]
                moves = own.is_floating_point()
                self.weights[name] = own.lerp(weight.to(own), self.settings.mixup) if moves else weight.to(own)
        fill(model, lambda name: self.policy.processes.broadcast_tensor(self.weights.get(name)))

    def _model(self) -> "PreTrainedModel":
        """At the first move the model that the policy started from."""
        if self.model is None:
            self.model = self.load()
            if self.policy.processes.is_main:
                self.weights = {
                    name: weight.detach().to("cpu", torch.promote_types(weight.dtype, torch.float32), copy=True)
                    for name, weight in self.model.state_dict().items()
                }
            runtime = self.policy.runtime
            module = TokenLogProbs(self.model, chunk_tokens=runtime.logits_chunk_tokens)
            self.module = frozen(module, runtime, self.policy.processes)
            self.say("the reference moves to the policy; from here on a model in memory gives its log-probs")
        return self.model

    def columns(self, rows: Rows) -> dict[str, list[Any]]:
        """Its log-probs of some pairs, as a table of reference log-probs has them; none before its first move."""
        if self.module is None:
            return {}
        if not self.per_token:
            sums = all_pair_logps(self.module, dict(rows), self.batching)
            return dict(zip(LOG_PROBS, (values.tolist() for values in sums), strict=True))
        sums, *tokens = all_pair_token_logps(self.module, dict(rows), self.batching)
        return dict(zip((*LOG_PROBS, *TOKEN_LOG_PROBS), (*(values.tolist() for values in sums), *tokens), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"moved": self.module is not None}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights, in the main process, which alone has them."""
        yield from self.weights.items()

    def load_state_dict(self, state: dict[str, Any], read: Callable[[str], torch.Tensor]) -> None:
        if not state["moved"]:
            return
        model = self._model()
        kept: dict[str, torch.Tensor] = {}

        def weight_of(name: str) -> torch.Tensor:
            kept[name] = read(name).clone()  # it may be a view of the checkpoint's file, which is removed in time
            return kept[name]

        fill(model, weight_of)
        self.weights = kept if self.policy.processes.is_main else {}


class LivePairs:
    """Pairs with the log-probs of a live reference, and with the cached ones as long as there is none."""

    def __init__(self, pairs: Table, reference: LiveReference) -> None:
        self.pairs = pairs
        self.reference = reference

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, rows: Any) -> Rows:
        columns = self.pairs[rows]
        return {**columns, **self.reference.columns(columns)}
