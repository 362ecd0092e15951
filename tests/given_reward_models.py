"""Tiny reward models of the kinds that are made elsewhere, as folders in the form of Hugging Face, weights random."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
PAD_ID, START_ID, END_ID = 0, 1, 2
TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
SIZES = {"vocab_size": 300, "initializer_range": 0.3, "pad_token_id": PAD_ID, "eos_token_id": END_ID}
DECODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, **DECODER, "max_position_embeddings": 128},
    "gpt2": {**SIZES, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "distilbert": {**SIZES, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 128},
    "roberta": {**SIZES, **DECODER, "max_position_embeddings": 130, "type_vocab_size": 1},
}


def save_tokenizer(folder: Path, *, template: str | None = TEMPLATE, longest: int = 128) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens that puts <s> and </s> around plain text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=SPECIAL)
    tokenizer.train_from_iterator(["a good film, a bad film; user assistant: what do you think of it?"] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", START_ID), ("</s>", END_ID)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, model_max_length=longest, **names
    )
    fast.save_pretrained(folder)
    return fast


def save_classifier(folder: Path, kind: str, *, labels: dict[int, str] | None = None, **changed: Any) -> None:
    """A sequence classifier of transformers; without `labels` it has one output."""
    named = {"num_labels": 1} if labels is None else {"id2label": labels, "label2id": {v: k for k, v in labels.items()}}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **CONFIGS[kind] | named | changed)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)


def save_value_head(folder: Path, layer: str, *, bias: bool, **changed: Any) -> None:
    """A GPT-2 with a layer of one output on its body, as TRL (`v_head.summary`) and OpenRLHF (`value_head`) do."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", **CONFIGS["gpt2"])
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights[f"{layer}.weight"] = torch.randn(1, 16)
    if bias:
        weights[f"{layer}.bias"] = torch.randn(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if changed:
        own = AutoConfig.from_pretrained(folder)
        own.update(changed)
        own.save_pretrained(folder)


def value_of(folder: Path, layer: str, ids: list[int]) -> float:
    """The layer of a folder on the last hidden state of its body."""
    weights = load_file(folder / "model.safetensors")
    body: PreTrainedModel = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = body(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    bias = weights.get(f"{layer}.bias", torch.zeros(1))
    return float(hidden @ weights[f"{layer}.weight"][0] + bias)


def logits_of(folder: Path) -> Callable[[list[list[int]]], torch.Tensor]:
    """transformers' own forward pass over sequences padded on the right with the tokenizer's pad, (b, labels)."""
    classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    @torch.no_grad()
    def logits(sequences: list[list[int]]) -> torch.Tensor:
        width = max(map(len, sequences))
        ids = torch.tensor([[*row, *[PAD_ID] * (width - len(row))] for row in sequences])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sequences])
        return classifier(input_ids=ids, attention_mask=mask).logits

    return logits
