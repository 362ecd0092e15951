"""Architectures with peculiarities: made right, refused, or remembered for the option that they rule out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3Config,
    GPTBigCodeConfig,
    LlamaConfig,
    OPTConfig,
    PhimoeConfig,
    Starcoder2Config,
)

from stages.lib.command.errors import StageError
from stages.lib.models import pretrained
from stages.lib.models.given_model import check_forward_pass
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.settings.runtime import read_runtime
from tests.real_files import PROJECT
from tests.tiny_models import CPU, EOS, PAD, VOCABULARY

RUNTIME = read_runtime("train_sft", PROJECT / "runtime.yaml")
LOADING = pretrained.Loading("fp32", RUNTIME, CPU)
IDS = torch.arange(3, 19)[None]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
LLAMA_LIKE = {**SIZES, "intermediate_size": 16, "num_key_value_heads": 1}
LEARNED = {**SIZES, "ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 64}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA_LIKE),
    "opt": OPTConfig(**LEARNED),  # dropout 0.1 in an attribute of the module
    "gpt_bigcode": GPTBigCodeConfig(**SIZES, n_positions=64),
    "starcoder2": Starcoder2Config(**LLAMA_LIKE, residual_dropout=0.1, embedding_dropout=0.1),
    "falcon": FalconConfig(**SIZES),
    "falcon with dropout": FalconConfig(**SIZES, hidden_dropout=0.3),  # read from the configuration in each pass
    "phimoe": PhimoeConfig(**LLAMA_LIKE, num_local_experts=4),  # draws its experts while it is trained
}


def new_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.4)
    return model


def logps(model: nn.Module) -> torch.Tensor:
    positions = torch.arange(IDS.shape[1])[None]
    with torch.no_grad():
        return TokenLogProbs(model)(IDS, None, positions, positions > 0)[0]


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt_bigcode", "starcoder2", "falcon"])
def test_a_loaded_model_in_training_is_what_it_is_in_evaluation(kind: str, tmp_path: Path) -> None:
    new_model(kind).save_pretrained(tmp_path)
    model = pretrained.load_language_model(tmp_path, LOADING)
    assert model.training
    training = [logps(model) for _ in range(2)]
    assert torch.equal(*training)
    assert torch.allclose(training[0], logps(model.eval()), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("falcon with dropout", "models of type falcon compute something else while they are trained"),
        ("phimoe", "models of type phimoe compute their logits in a way of their own"),  # without its noise
    ],
)
def test_a_model_that_draws_numbers_is_refused(kind: str, message: str) -> None:
    with pytest.raises(StageError, match=f"x cannot be trained here: {message}"):
        check_forward_pass(new_model(kind), "x")


def test_a_language_model_among_others_is_refused() -> None:
    config = Gemma3Config(
        text_config={**LLAMA_LIKE, "head_dim": 8},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(StageError, match="models of type gemma3 hold a language model among others"):
        check_forward_pass(model, "x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "can_be_packed"), [("llama", True), ("opt", False), ("falcon", False)])
def test_where_packed_sequences_see_each_other_packing_is_refused(
    kind: str, can_be_packed: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = new_model(kind).to(dtype)
    check_forward_pass(model, "x")
    model.save_pretrained(tmp_path / "base")
    assert json.loads((tmp_path / "base/config.json").read_text()).get("can_be_packed", True) == can_be_packed
    # What was trained from it knows it too.
    pretrained.load_language_model(tmp_path / "base", LOADING).save_pretrained(tmp_path / "sft")
    packing = replace(RUNTIME, packing=True)
    if can_be_packed:
        assert pretrained.load_language_model(tmp_path / "sft", replace(LOADING, runtime=packing)) is not None
        return
    with pytest.raises(StageError, match=rf"runtime.yaml: packing: in models of type {kind}, as .*sft is, sequences"):
        pretrained.load_language_model(tmp_path / "sft", replace(LOADING, runtime=packing))


def test_checkpointing_leaves_a_frozen_model_without_gradients(tmp_path: Path) -> None:
    new_model("llama").save_pretrained(tmp_path)
    runtime = replace(RUNTIME, gradient_checkpointing=True)
    model = pretrained.load_language_model(tmp_path, replace(LOADING, runtime=runtime, frozen=True)).requires_grad_(
        False
    )
    positions = torch.arange(IDS.shape[1])[None]
    assert not TokenLogProbs(model)(IDS, None, positions, positions > 0)[0].requires_grad
