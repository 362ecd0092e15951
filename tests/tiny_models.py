"""Language models small enough to be worked through by hand, with random weights from a seed."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from stages.lib.compute.batching import MicroBatching
from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.compute.processes import Processes

VOCABULARY = 23
EOS, PAD = 1, 2
CPU = torch.device("cpu")


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(_llama_config()).train()


def tiny_classifier(seed: int = 0) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(_llama_config()).train()


def _llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        num_labels=1,
    )


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Learned positions: the architecture that a shifted position id would hurt most."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return GPT2LMHeadModel(config).train()


def batching(
    tokens: int, packing: bool = False, pad_id: int = PAD, processes: Processes | None = None
) -> MicroBatching:
    """Micro-batches of at most `tokens` tokens, on one process or on several."""
    return MicroBatching(MemoryBudget("micro_batch_tokens", tokens), packing, pad_id, processes or Processes(0, 1, CPU))
