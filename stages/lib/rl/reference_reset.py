"""A reference that becomes the policy from time to time, so that the KL does not hold it back for good."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from stages.lib.compute.engine.base import Engine
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.settings.reference_reset import ReferenceReset

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ResetReference:
    """The reference's weights, once they are the policy's (ProRL, arXiv 2505.24864); part of a checkpoint.

    All processes call its methods together.

    Args:
        settings: None: it is never reset.
        reference: of a model of its own, of which each process holds all, where it is to be reset.
        policy_model: the language model in the policy's engine.
    """

    def __init__(
        self,
        settings: ReferenceReset | None,
        reference: Callable | None,
        policy: Engine,
        policy_model: "PreTrainedModel",
    ) -> None:
        self.settings = settings
        self.reference = reference
        self.policy = policy
        self.policy_model = policy_model
        self.was_reset = False

    def after_phase(self, iteration: int) -> bool:
        """Reset it if that is due after a phase (0-based). Returns whether it was."""
        if self.settings is None or (iteration + 1) % self.settings.every:
            return False
        weights = self.policy.master_weights(self.policy_model)
        self._fill(lambda name: self.policy.processes.broadcast_tensor(weights.get(name)))
        self.was_reset = True
        return True

    @torch.no_grad()
    def _fill(self, weight_of: Callable[[str], torch.Tensor]) -> None:
        for name, held in self._held().items():
            held.copy_(weight_of(name))

    def _held(self) -> dict[str, torch.Tensor]:
        """By name; tied weights are one tensor, and come once."""
        assert isinstance(self.reference, TokenLogProbs)
        weights = self.reference.language_model.state_dict()
        return {name: weights[name] for name in {weight.data_ptr(): name for name, weight in weights.items()}.values()}

    def state_dict(self) -> dict[str, Any]:
        return {"was_reset": self.was_reset}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The reference's weights once it was reset; before that they are those of a folder."""
        yield from self._held().items() if self.was_reset else ()

    def load_state_dict(self, state: dict[str, Any], read: Callable[[str], torch.Tensor]) -> None:
        self.was_reset = state["was_reset"]
        if self.was_reset:
            self._fill(read)
