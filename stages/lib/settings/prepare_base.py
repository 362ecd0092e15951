"""Section `prepare_base` of params.yaml: the models that are there before any training, each under its own name."""

import re
from typing import Annotated, Literal

from annotated_types import MaxLen
from pydantic import StringConstraints, model_validator

from stages.lib.command.wrong_values import TEMPLATE_NAME
from stages.lib.settings.bounds import Count, Layers, Name, Several, Text, Width
from stages.lib.settings.declaration import Settings, block, key

BASE = "base"  # the name of the model whose tokenizer encodes the data
PAD_TOKEN = "<|pad|>"
EOS_TOKEN = "<|endoftext|>"
BYTES = 256
HUB_NAME = re.compile(r"(?!.*\.\.)[\w.-]{1,96}(/[\w.-]{1,96})?")
TemplateName = Annotated[str, StringConstraints(pattern=TEMPLATE_NAME, max_length=128)]
Dtype = Literal["float32", "bfloat16", "float16"]
CHAT_TEMPLATE = "name of a file of stages/chat_templates: chat.jinja, or one of your own that you put there"
SPECIAL_TOKENS = "added if absent"
DTYPE = "of the saved weights: float32 | bfloat16 | float16"


class NewModel(Settings):
    """A new Llama of this size, with tied embeddings and random weights, and a tokenizer trained for it."""

    corpus: Text = key("data/prepared/train/sft.jsonl", "rows the tokenizer is trained on, such as those prepared here")
    chat_template: TemplateName = key("chat.jinja", CHAT_TEMPLATE)
    special_tokens: Several[Text] = key(["<|system|>", "<|user|>", "<|assistant|>"], SPECIAL_TOKENS)
    dtype: Dtype = key("float32", DTYPE)
    vocab_size: Width = key(1024, "at most; at least 256 bytes, pad, EOS and special_tokens", unit="tokens")
    hidden_size: Width = key(128, "a multiple of 2 * heads")
    intermediate_size: Width = key(344, "of the MLP")
    layers: Layers = key(3, "transformer blocks")
    heads: Count = key(4, "of attention; a multiple of key_value_heads")
    key_value_heads: Count = key(4, "fewer than heads: grouped-query attention", source="arXiv 2305.13245")
    max_positions: Count = key(192, "tokenize_data.max_length may not exceed it", unit="tokens")

    @model_validator(mode="after")
    def _check(self) -> "NewModel":
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of twice heads ({self.heads}): "
                "rotary positions turn pairs of a head's dimensions"
            )
        if self.heads % self.key_value_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of key_value_heads ({self.key_value_heads})")
        _refuse_repeated(self.special_tokens)
        if {PAD_TOKEN, EOS_TOKEN} & set(self.special_tokens):
            raise ValueError(f"special_tokens must not hold {PAD_TOKEN} or {EOS_TOKEN}: they are always there")
        least = BYTES + 2 + len(self.special_tokens)
        if self.vocab_size < least:
            raise ValueError(f"vocab_size must be at least {least}: {BYTES} bytes and the special tokens")
        return self


class _GivenModel(Settings):
    """What is added to a model from elsewhere, and changed in it."""

    chat_template: TemplateName | None = key(None, f"{CHAT_TEMPLATE}; null: the model's own")
    special_tokens: Several[Text] = key([], f"{SPECIAL_TOKENS}, such as the chat template's markers of roles")
    eos_token: Text | None = key(None, "token that ends a reply; null: the tokenizer's own EOS")
    dtype: Dtype = key("float32", DTYPE)

    @model_validator(mode="after")
    def _check_tokens(self) -> "_GivenModel":
        _refuse_repeated(self.special_tokens)
        return self


class ModelOfFolder(_GivenModel):
    """A model folder in the form of Hugging Face."""

    path: Text = key("data/raw/model", "the model's folder")


class ModelOfHub(_GivenModel):
    """A model of the Hugging Face Hub at one commit."""

    model: Text = key("owner/name", "owner/name")
    revision: Text = key("0" * 40, "full commit hash, 40 hexadecimal digits: a branch or tag can move")

    @model_validator(mode="after")
    def _check(self) -> "ModelOfHub":
        if not HUB_NAME.fullmatch(self.model):
            raise ValueError(f"model must be owner/name, found {self.model}")
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(
                f"revision must be a full commit hash of 40 hexadecimal digits, found {self.revision}: "
                "a branch or tag can move, and the model with it"
            )
        return self


class PrepareBase(Settings):
    """Models by name, each written to models/<name>; one of them is named base."""

    scratch: Annotated[dict[Name, NewModel], MaxLen(100)] = key(
        {BASE: block(NewModel)}, "new models, by name: random weights, a tokenizer trained on the corpus"
    )
    files: Annotated[dict[Name, ModelOfFolder], MaxLen(100)] = key({}, "models of folders, by name")
    hub: Annotated[dict[Name, ModelOfHub], MaxLen(100)] = key({}, "models of the Hugging Face Hub, by name")

    @model_validator(mode="after")
    def _check(self) -> "PrepareBase":
        names = [*self.scratch, *self.files, *self.hub]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two models are named {repeated[0]}, of scratch, files and hub")
        if BASE not in names:
            raise ValueError(f"no model is named {BASE}: one of scratch, files or hub must be, the one to start from")
        return self

    @property
    def models(self) -> "dict[str, NewModel | ModelOfFolder | ModelOfHub]":
        """All of them by name."""
        return {**self.scratch, **self.files, **self.hub}

    def place_of(self, name: str) -> str:
        """Where a model stands in params.yaml."""
        group = next(group for group in ("scratch", "files", "hub") if name in getattr(self, group))
        return f"prepare_base.{group}.{name}"


def _refuse_repeated(special_tokens: tuple[str, ...]) -> None:
    if len(set(special_tokens)) != len(special_tokens) or "" in special_tokens:
        raise ValueError("special_tokens holds a token twice, or an empty one")
