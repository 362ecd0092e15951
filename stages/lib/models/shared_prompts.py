"""Decoding behind prompts that several rows share: keys and values of a prompt exist once, those of a row behind them.

A row attends to its prompt and to its own tokens, in one softmax over both:

    softmax(s [q K_promptᵀ, q K_ownᵀ]) [V_prompt; V_own]

All rows have as many tokens of their own, so these need no mask. Prompts are padded on the right.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from stages.lib.models.model_traits import longest_whole_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "shared_prompts"  # its name among the kernels of transformers
PIECE = 64  # tokens for which each row has room at first
DECODED: ContextVar["SharedPrompts"] = ContextVar("the rows whose next token is computed")


class PromptLayer:
    """Keys and values of one layer: of the prompts (p, heads, width, d), and of the rows (n, heads, room, d)."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.prompt_keys, self.prompt_values = keys, values
        self.own_keys, self.own_values = (states.new_empty((0, *states.shape[1:])) for states in (keys, values))

    def add(self, place: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The states of the rows' token number `place`, each (n, heads, 1, d)."""
        if place == self.own_keys.shape[2] or place == 0:
            self.own_keys, self.own_values = with_room(self.own_keys, keys), with_room(self.own_values, values)
        self.own_keys[:, :, place : place + 1] = keys
        self.own_values[:, :, place : place + 1] = values

    def keep(self, rows: torch.Tensor, tokens: int, prompts: torch.Tensor | None, width: int) -> None:
        """Drop all rows but these, and all prompts but those.

        Args:
            tokens: that each row has by now.
            prompts: those to keep; None: all.
            width: of the prompts that are kept.
        """
        if tokens:
            room = self.own_keys.shape[2]
            own = (states[:, :, :tokens].index_select(0, rows) for states in (self.own_keys, self.own_values))
            self.own_keys, self.own_values = (with_room(states, states, room) for states in own)
        if prompts is not None:
            self.prompt_keys = self.prompt_keys[:, :, :width].index_select(0, prompts)
            self.prompt_values = self.prompt_values[:, :, :width].index_select(0, prompts)


def with_room(states: torch.Tensor, more: torch.Tensor, room: int = 0) -> torch.Tensor:
    """The same states of tokens with room for others behind them, (n, heads, tokens, d) → (n, heads, room, d).

    Args:
        more: states of the rows, as many as there will be, of at least one token.
        room: by default twice as many tokens, or a thousand more.
    """
    tokens = states.shape[2] if len(states) else 0
    wider = more.new_empty((*more.shape[:2], room or max(PIECE, tokens + min(tokens, 1024)), more.shape[3]))
    if tokens:
        wider[:, :, :tokens] = states
    return wider


class SharedPrompts:
    """A key-value cache as transformers' models use one, of rows that have read their prompts.

    Args:
        layers: keys and values of each layer, (p, heads, width, d), padded on the right.
        lengths: tokens of each of the p prompts.
        prompt_of: of each row the place of its prompt, in rising order.
    """

    def __init__(
        self,
        layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
        lengths: torch.Tensor,
        prompt_of: torch.Tensor,
    ) -> None:
        self.layers = [PromptLayer(*states) for states in layers]
        self.lengths = lengths
        self.prompt_of = prompt_of
        self.tokens = 0  # of each row, those under way included
        self._lay_out()

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in the states of one more token of each row, (n, heads, 1, d)."""
        if layer_idx == 0:
            self.tokens += 1
        self.layers[layer_idx].add(self.tokens - 1, keys, values)
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        """Of the longest row; nothing is computed from it, since positions are given."""
        return self.width + self.tokens

    def keep(self, rows: torch.Tensor) -> None:
        """Forget all but these rows, in rising order, and prompts that none of them has."""
        kept, prompt_of = torch.unique_consecutive(self.prompt_of[rows], return_inverse=True)
        fewer = len(kept) < len(self.lengths)
        if fewer:
            self.lengths = self.lengths[kept]
        self.prompt_of = prompt_of
        width = int(self.lengths.max())
        for layer in self.layers:
            layer.keep(rows, self.tokens, kept if fewer else None, width)
        self._lay_out()

    def _lay_out(self) -> None:
        """Where each row stands in a grid of prompts and samples, whose empty places hold the first row."""
        self.width = self.layers[0].prompt_keys.shape[2]
        prompts, rows = len(self.lengths), torch.arange(len(self.prompt_of), device=self.prompt_of.device)
        first = torch.searchsorted(self.prompt_of, self.prompt_of)
        self.samples = int((rows - first).max()) + 1
        self.places = self.prompt_of * self.samples + rows - first
        self.is_full = len(rows) == prompts * self.samples
        self.grid = torch.zeros(prompts * self.samples, dtype=torch.long, device=rows.device)
        self.grid[self.places] = rows
        padding = torch.arange(self.width, device=rows.device) >= self.lengths[:, None]
        self.padding = padding[:, None, None] if bool(padding.any()) else None

    def on_grid(self, values: torch.Tensor) -> torch.Tensor:
        """Values of rows, (n, heads, m, d), as those of prompts, (p, heads, samples · m, d)."""
        spread = values if self.is_full else values[self.grid]
        if self.samples == 1:
            return spread
        heads, several, size = values.shape[1:]
        spread = spread.view(-1, self.samples, heads, several, size).transpose(1, 2)
        return spread.reshape(-1, heads, self.samples * several, size)

    def off_grid(self, values: torch.Tensor, several: int) -> torch.Tensor:
        """The reverse: (p, heads, samples · m, d) → (n, heads, m, d)."""
        if self.samples > 1:
            heads, size = values.shape[1], values.shape[3]
            spread = values.view(-1, heads, self.samples, several, size).transpose(1, 2)
            values = spread.reshape(-1, heads, several, size)
        return values if self.is_full else values[self.places]

    def attention(self, query: torch.Tensor, layer: PromptLayer, scaling: float, softcap: float | None) -> torch.Tensor:
        """Of one token of each row, (n, heads, 1, d) → (n, 1, heads, d of the values)."""
        rows, heads, _, size = query.shape
        of_keys = layer.own_keys.shape[1]
        several = heads // of_keys
        query = query.view(rows, of_keys, several, size)
        own_keys, own_values = (states[:, :, : self.tokens] for states in (layer.own_keys, layer.own_values))
        if query.dtype in (torch.float32, torch.float64):
            scaled = query * scaling
            scores = self.on_grid(scaled) @ layer.prompt_keys.transpose(2, 3)
            own = scaled @ own_keys.transpose(2, 3)
            if softcap is not None:
                scores, own = (softcap * torch.tanh(some / softcap) for some in (scores, own))
            if self.padding is not None:
                scores = scores.masked_fill_(self.padding, -torch.inf)
            shares = torch.softmax(torch.cat([self.off_grid(scores, several), own], dim=-1), dim=-1)
            of_prompt, of_own = shares.split([self.width, self.tokens], dim=-1)
            read = self.off_grid(self.on_grid(of_prompt) @ layer.prompt_values, several) + of_own @ own_values
        else:  # scores in half precision would be rounded to 8 bits, where this kernel keeps them in float32
            keys = torch.cat([layer.prompt_keys[self.prompt_of], own_keys], dim=2)
            values = torch.cat([layer.prompt_values[self.prompt_of], own_values], dim=2)
            seen = None
            if self.padding is not None:
                seen = ~self.padding[self.prompt_of]
                seen = torch.cat([seen, seen.new_ones((rows, 1, 1, self.tokens))], dim=-1)
            read = scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scaling)
        return read.reshape(rows, 1, heads, -1)


def shared_prompt_attention(
    module: Any,
    query: torch.Tensor,
    *_: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' models call in place of their attention; keys and values are in the cache already."""
    cache = DECODED.get()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return cache.attention(query, cache.layers[module.layer_idx], scale, softcap), None


@contextmanager
def decoding(model: "PreTrainedModel", cache: SharedPrompts) -> Iterator[None]:
    """Passes of `model` compute the next token of the rows of `cache`."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, shared_prompt_attention)
    config = model.config
    before, token = config._attn_implementation, DECODED.set(cache)
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
        DECODED.reset(token)


def longest_behind_shared_prompts(model: "PreTrainedModel") -> int:
    """How many tokens a prompt with its response may have to be decoded so; 0: none, or it is not known."""
    takes_kernels = getattr(model, "_supports_attention_backend", False)
    has_sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())  # scores beside those of tokens
    in_half = model.dtype not in (torch.float32, torch.float64)
    has_softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if not takes_kernels or has_sinks or (in_half and has_softcap):
        return 0
    return longest_whole_attention(model)
