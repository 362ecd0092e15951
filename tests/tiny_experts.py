"""Mixtures of experts small enough to be worked through by hand, with random weights from a seed."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.tiny_models import EOS, PAD, VOCABULARY

EXPERTS, CHOSEN = 4, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": CHOSEN,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "num_labels": 1,
    "experts_implementation": "eager",  # the fused kernels do not compute in float64, and take longer at this size
}


def save_mixtral(base: Path, folder: Path) -> None:
    """A model folder with the tokenizer and the vocabulary of `base`, and a mixture of experts in its place."""
    shutil.copytree(base, folder)
    config = json.loads((base / "config.json").read_text())
    same = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    sizes = {name: value for name, value in SIZES.items() if name not in ("experts_implementation", "num_labels")}
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(**sizes | {name: config[name] for name in same} | {"num_local_experts": EXPERTS})
    )
    model.save_pretrained(folder)


def tiny_olmoe(seed: int = 0, **changed: Any) -> OlmoeForCausalLM:
    torch.manual_seed(seed)
    return OlmoeForCausalLM(OlmoeConfig(**SIZES | {"num_experts": EXPERTS} | changed)).train()


def tiny_mixtral(seed: int = 0, **changed: Any) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**SIZES | {"num_local_experts": EXPERTS} | changed)).train()


def tiny_mixtral_classifier(seed: int = 0) -> MixtralForSequenceClassification:
    torch.manual_seed(seed)
    return MixtralForSequenceClassification(MixtralConfig(**SIZES, num_local_experts=EXPERTS)).train()


def tiny_qwen2_moe(seed: int = 0) -> Qwen2MoeForCausalLM:
    """Beside the chosen experts, one that every token goes through."""
    torch.manual_seed(seed)
    sizes = {"num_experts": EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES | sizes)).train()


def tiny_qwen3_moe(seed: int = 0) -> Qwen3MoeForCausalLM:
    """Its first layer has no experts."""
    torch.manual_seed(seed)
    sizes = {"num_experts": EXPERTS, "moe_intermediate_size": 24, "mlp_only_layers": [0]}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | sizes)).train()
