"""The forward passes of sampling: over prompts, then over one more token of each response, with a key-value cache."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from stages.lib.compute.batching import pad_left
from stages.lib.compute.pass_cost import cheapest_cut
from stages.lib.models.shared_prompts import SharedPrompts, decoding
from stages.lib.rl.sampling import positions_of
from stages.lib.settings.runtime import PassCost

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Decoding(Protocol):
    """Rows that are decoded together, each behind its prompt."""

    @property
    def first(self) -> torch.Tensor:
        """The logits after the prompts, (n, vocabulary)."""
        ...

    @property
    def may_leave(self) -> bool:
        """Whether rows may leave before the others have ended."""
        ...

    def next(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits after these tokens, (n,) → (n, vocabulary)."""
        ...

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone, in rising order."""
        ...


class BehindSharedPrompts:
    """Each prompt is read once, beside prompts of about its length, and its samples are decoded behind one copy.

    Args:
        policy: a `TokenLogProbs` module or an engine around one.
        prompts: of this process.
        samples: how many rows each prompt has.
        widths: tokens of the longest of the prompts that all processes have at this place, by which all of them cut
            the prompts into as many passes; there may be more of them than this process has prompts.
        cost: of passes.
    """

    may_leave = True

    def __init__(
        self,
        policy: Callable,
        model: "PreTrainedModel",
        prompts: Sequence[Sequence[int]],
        samples: Sequence[int],
        widths: Sequence[int],
        pad_id: int,
        cost: PassCost,
        device: torch.device,
    ) -> None:
        self.policy, self.model = policy, model
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        first, layers = torch.empty(0), list[tuple[torch.Tensor, torch.Tensor]]()
        for group in cheapest_cut(widths, len(widths) * max(widths), cost).groups:
            own = [place for place in group if place < len(prompts)]
            states, after = self._read([prompts[place] for place in own or [0]], pad_id, device)
            if not layers:
                first = after.new_empty((len(prompts), after.shape[1]))
                layers = [(room_for(keys, lengths), room_for(values, lengths)) for keys, values in states]
            if own:
                first[own] = after
                for room, filled in zip(layers, states, strict=True):
                    for every, some in zip(room, filled, strict=True):
                        every[own, :, : some.shape[2]] = some
        prompt_of = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(samples)).to(device)
        self.first = first[prompt_of]
        self.cache = SharedPrompts(layers, lengths, prompt_of)
        self.positions = lengths[prompt_of]

    def _read(
        self, prompts: list[Sequence[int]], pad_id: int, device: torch.device
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """Keys and values of each layer, and the logits behind the prompts."""
        from transformers import DynamicCache

        cache: Any = DynamicCache(config=self.model.config)
        lengths = [len(prompt) for prompt in prompts]
        ids = np.full((len(prompts), max(lengths)), pad_id, dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        positions = torch.arange(ids.shape[1], device=device).expand(ids.shape)
        of_rows = (torch.from_numpy(ids).to(device), positions, torch.tensor(lengths, device=device), cache)
        logits = self.policy(*of_rows, run="prompt_logits")
        return [(layer.keys, layer.values) for layer in cache.layers], logits

    def next(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = (self.positions + self.cache.tokens)[:, None]
        with decoding(self.model, self.cache):
            return self.policy(tokens[:, None], None, positions, self.cache, run="next_logits")

    def keep(self, rows: torch.Tensor) -> None:
        self.cache.keep(rows)
        self.positions = self.positions[rows]


def room_for(states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Zeros for the states of prompts of these lengths, (p, heads, width, d); `states` are those of some of them."""
    return states.new_zeros((len(lengths), states.shape[1], int(lengths.max()), states.shape[3]))


class PaddedTogether:
    """Every row reads its prompt by itself, padded on the left to the longest, and stays until all have ended."""

    may_leave = False

    def __init__(
        self,
        policy: Callable,
        model: "PreTrainedModel",
        prompts: Sequence[Sequence[int]],
        pad_id: int,
        device: torch.device,
    ) -> None:
        from transformers import DynamicCache

        self.policy = policy
        self.cache: Any = DynamicCache(config=model.config)
        ids, self.mask = pad_left(prompts, pad_id, device)
        positions = positions_of(self.mask)
        self.first = policy(ids, self.mask, positions, self.cache, run="next_logits")
        self.positions = positions[:, -1:]

    def next(self, tokens: torch.Tensor) -> torch.Tensor:
        self.mask = torch.cat([self.mask, torch.ones_like(tokens[:, None], dtype=torch.bool)], dim=1)
        self.positions = self.positions + 1
        return self.policy(tokens[:, None], self.mask, self.positions, self.cache, run="next_logits")

    def keep(self, rows: torch.Tensor) -> None:
        raise NotImplementedError("the caches of such models cannot be cut")
