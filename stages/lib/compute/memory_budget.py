"""A size of `runtime.yaml` that decides how much memory a pass takes, and what is done where it takes too much.

budget = MemoryBudget("micro_batch_tokens", 8192, may_halve=True)
sums = budget.attempt(lambda: passes_of_a_step(budget.size), engine)
"""

import gc
import sys
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from stages.lib.command.errors import StageError
from stages.lib.command.out_of_memory import is_out_of_memory, reason_of

Result = TypeVar("Result")


class HasGradients(Protocol):
    """What adds up gradients over the passes of a step: an engine of plain torch."""

    def discard_gradients(self) -> None: ...


class MemoryBudget:
    """How much is computed at a time; part of a checkpoint, so that a resumed run goes on with what has fitted.

    Args:
        key: of `runtime.yaml`, which says what it counts.
        size: what that key asks for.
        may_halve: whether a computation that runs out of memory is repeated at half the size (one process alone, since
            the others would wait in a collective).
    """

    def __init__(self, key: str, size: int, *, may_halve: bool = False) -> None:
        self.key = key
        self.asked_for = self.size = size
        self.may_halve = may_halve
        self.rows: int | None = None  # of the pass under way, where it is known: one row cannot be cut

    def attempt(self, compute: Callable[[], Result], *engines: HasGradients) -> Result:
        """The result of `compute`, which is repeated whole at half the size whenever it runs out of memory.

        Args:
            compute: reads `size`, and changes nothing that its repetition would meet but the gradients of `engines`.
        Raises:
            StageError: a single row does not fit.
        """
        while True:
            self.rows = None
            try:
                return compute()
            except (MemoryError, RuntimeError) as error:
                if not self.may_halve or not is_out_of_memory(error):
                    raise
                reason = reason_of(error)
            # Only now is the error gone, which held the frames of the pass, and they its tensors.
            for engine in engines:
                engine.discard_gradients()
            self._halve(reason)

    def _halve(self, reason: str) -> None:
        if self.size == 1 or self.rows == 1:
            raise StageError(
                f"out of memory ({reason}) on a single row, which runtime.yaml: {self.key} cannot cut; lower "
                "logits_chunk_tokens, set gradient_checkpointing: true, or leave out long rows "
                "(tokenize_data.max_length)"
            )
        self.size //= 2
        print(
            f"warning: out of memory ({reason}): the step is repeated with {self.key} {self.size}, which stays in "
            "force; the last digits may differ from those of a run without this",
            file=sys.stderr,
            flush=True,
        )
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def state_dict(self) -> dict[str, Any]:
        return {"asked_for": self.asked_for, "size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what has fitted, unless `runtime.yaml` asks for another size than it did then."""
        if state["asked_for"] == self.asked_for:
            self.size = state["size"]
