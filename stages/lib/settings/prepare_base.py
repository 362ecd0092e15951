"""Section `prepare_base` of params.yaml: the model that everything starts from, and its tokenizer."""

import re
from typing import Literal

from pydantic import model_validator

from stages.lib.settings.bounds import Count, Layers, Several, Text, Width
from stages.lib.settings.declaration import Settings, block, key

NO_FILE = "data/raw/none"
PAD_TOKEN = "<|pad|>"
EOS_TOKEN = "<|endoftext|>"
BYTES = 256
HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


class Scratch(Settings):
    """A new Llama of this size, with tied embeddings."""

    vocab_size: Width = key(1024, "at most; at least 256 bytes, pad, EOS and special_tokens", unit="tokens")
    hidden_size: Width = key(128, "a multiple of 2 * heads")
    intermediate_size: Width = key(344, "of the MLP")
    layers: Layers = key(3, "transformer blocks")
    heads: Count = key(4, "of attention; a multiple of key_value_heads")
    key_value_heads: Count = key(4, "fewer than heads: grouped-query attention", source="arXiv 2305.13245")
    max_positions: Count = key(192, "tokenize_data.max_length may not exceed it", unit="tokens")

    @model_validator(mode="after")
    def _check(self) -> "Scratch":
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of twice heads ({self.heads}): "
                "rotary positions turn pairs of a head's dimensions"
            )
        if self.heads % self.key_value_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of key_value_heads ({self.key_value_heads})")
        return self


class PrepareBase(Settings):
    """The base model: new, from a folder, or from the Hugging Face Hub."""

    source: Literal["scratch", "local", "hub"] = key(
        "scratch", "scratch: a new Llama | local: a model folder at path | hub: hub_model of the Hugging Face Hub"
    )
    path: Text = key(NO_FILE, f"source local: the model's folder; {NO_FILE} with any other source")
    hub_model: Text | None = key(None, "source hub: owner/name; null with any other source")
    hub_revision: Text | None = key(None, "source hub: full commit hash, 40 hexadecimal digits; else null")
    corpus: Text = key(
        "data/prepared/train/sft.jsonl",
        f"source scratch: rows the tokenizer is trained on; {NO_FILE} with any other",
    )
    chat_template: Text = key(
        "stages/templates/chat.jinja", f"a Jinja file, or {NO_FILE}: keep the model's own (not with scratch)"
    )
    special_tokens: Several[Text] = key(
        ["<|system|>", "<|user|>", "<|assistant|>"], "added if absent; [] when the model's own template is kept"
    )
    eos_token: Text | None = key(
        None, "token that ends a reply; null: the tokenizer's own EOS (must be null with scratch)"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = key("float32", "of the saved weights")
    scratch: Scratch = key(block(Scratch), "source scratch: size of the new Llama")

    @model_validator(mode="after")
    def _check(self) -> "PrepareBase":
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
        return self

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
