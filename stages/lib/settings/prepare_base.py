"""Section `prepare_base` of params.yaml; the file explains each key."""

import re
from dataclasses import dataclass
from typing import Literal

from stages.lib.settings.bounds import Count, Layers, Width

NO_FILE = "data/raw/none"
PAD_TOKEN = "<|pad|>"
EOS_TOKEN = "<|endoftext|>"
BYTES = 256
HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


@dataclass(frozen=True)
class Scratch:
    """Section `prepare_base.scratch`: a Llama of this size."""

    vocab_size: Width
    hidden_size: Width
    intermediate_size: Width
    layers: Layers
    heads: Count
    key_value_heads: Count
    max_positions: Count

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of twice heads ({self.heads}): "
                "rotary positions turn pairs of a head's dimensions"
            )
        if self.heads % self.key_value_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of key_value_heads ({self.key_value_heads})")


@dataclass(frozen=True)
class PrepareBase:
    """Section `prepare_base` of params.yaml; the file explains each key."""

    source: Literal["scratch", "local", "hub"]
    path: str
    hub_model: str | None
    hub_revision: str | None
    corpus: str
    chat_template: str
    special_tokens: tuple[str, ...]
    eos_token: str | None
    dtype: Literal["float32", "bfloat16", "float16"]
    scratch: Scratch

    def __post_init__(self) -> None:
        if (self.source == "local") != (self.path != NO_FILE):
            raise ValueError(
                f"path must be a model folder with source local, and {NO_FILE} with any other: "
                f"source is {self.source}, path is {self.path}"
            )
        if (self.source == "scratch") != (self.corpus != NO_FILE):
            raise ValueError(
                f"corpus must be a file with source scratch, and {NO_FILE} with any other (else it would "
                f"make the base model stale for nothing): source is {self.source}, corpus is {self.corpus}"
            )
        self._check_hub()
        if len(set(self.special_tokens)) != len(self.special_tokens) or "" in self.special_tokens:
            raise ValueError("special_tokens holds a token twice, or an empty one")
        if self.source == "scratch":
            self._check_scratch()

    def _check_hub(self) -> None:
        if self.source != "hub" and (self.hub_model or self.hub_revision):
            raise ValueError(f"hub_model and hub_revision must be null with source {self.source}")
        if self.source == "hub" and not HUB_NAME.fullmatch(self.hub_model or ""):
            raise ValueError(f"hub_model must be owner/name with source hub, found {self.hub_model}")
        if self.source == "hub" and not re.fullmatch(r"[0-9a-f]{40}", self.hub_revision or ""):
            raise ValueError(
                f"hub_revision must be a full commit hash of 40 hexadecimal digits, found {self.hub_revision}: "
                "a branch or tag can move, and the base model with it"
            )

    def _check_scratch(self) -> None:
        if self.chat_template == NO_FILE:
            raise ValueError("chat_template must be a file with source scratch: a new model has none of its own")
        if self.eos_token is not None:
            raise ValueError(f"eos_token must be null with source scratch: the new tokenizer's is {EOS_TOKEN}")
        if {PAD_TOKEN, EOS_TOKEN} & set(self.special_tokens):
            raise ValueError(f"special_tokens must not hold {PAD_TOKEN} or {EOS_TOKEN}: they are always there")
        least = BYTES + 2 + len(self.special_tokens)
        if self.scratch.vocab_size < least:
            raise ValueError(f"scratch.vocab_size must be at least {least}: {BYTES} bytes and the special tokens")
