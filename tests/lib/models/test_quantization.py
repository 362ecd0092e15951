"""NF4 on this machine: the stored values are those of the paper, and what is merged is what was computed with."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from stages.lib.command.errors import StageError
from stages.lib.models.lora import Lora
from stages.lib.models.quantization import (
    dequantized,
    keeps_block_maxima,
    nf4_options,
    quantized_layers,
    require_nf4,
    settle_quantized_layers,
    whole_twin,
)
from stages.lib.settings.declaration import block
from stages.lib.settings.lora import LoraSettings
from tests.tiny_models import CPU, EOS, PAD, VOCABULARY

# QLoRA, arXiv 2305.14314, Appendix E.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
IDS = torch.randint(3, 23, (3, 8), generator=torch.Generator().manual_seed(2))


def llama(seed: int = 0, width: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


def in_nf4(base: Path, auto_class: type = AutoModelForCausalLM, **options: int) -> nn.Module:
    model = auto_class.from_pretrained(base, dtype=torch.float32, **nf4_options(torch.float32, CPU), **options)
    settle_quantized_layers(model)
    return model


def test_weights_are_the_nearest_nf4_values_of_their_block(base: Path) -> None:
    layers = quantized_layers(in_nf4(base))
    assert len(layers) == 2 * 7
    codes = torch.tensor(NF4)
    for name, layer in layers.items():
        original = llama().get_parameter(f"{name}.weight").detach().reshape(-1, 64)
        scale = original.abs().amax(dim=1, keepdim=True)
        nearest = codes[((original / scale)[..., None] - codes).abs().argmin(dim=-1)]
        # The scales themselves are held in 8 bits, as differences from their mean.
        assert torch.allclose(dequantized(layer).reshape(-1, 64), nearest * scale, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_a_merged_model_is_the_one_that_was_trained(base: Path, auto_class: type) -> None:
    options = {"num_labels": 1} if auto_class is AutoModelForSequenceClassification else {}
    torch.manual_seed(0)
    model = in_nf4(base, auto_class, **options)
    lora = Lora(
        model,
        LoraSettings(**block(LoraSettings, rank=2, alpha=4, targets=["q_proj", "up_proj"], base_quantization="nf4")),
        0,
        base,
    )
    with torch.no_grad():
        for name in lora.trained_names:
            model.get_parameter(name).normal_(std=0.3)
    output = model(IDS).logits
    output.square().sum().backward()
    assert all(float(model.get_parameter(name).grad.norm()) > 0 for name in lora.trained_names)
    plain = whole_twin(model).to_empty(device="cpu")
    assert not hasattr(plain.config, "quantization_config")
    merged = lora.merged(model.state_dict())
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    rebuilt = auto_class.from_config(plain.config)
    rebuilt.load_state_dict(merged)
    assert torch.allclose(rebuilt(IDS).logits, output, rtol=1e-5, atol=2e-5)
    whole = sum(weight.numel() for weight in rebuilt.parameters())
    head = options.get("num_labels", 0) * 64
    assert lora.counts()["total_parameters"] == whole + lora.counts()["trained_parameters"] - head


def test_a_shape_that_comes_back_wrong_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import functional

    model = in_nf4(base)
    settle_quantized_layers(model)
    assert keeps_block_maxima(64, torch.float32, CPU)
    assert keeps_block_maxima(128, torch.bfloat16, CPU)
    right = functional.dequantize_4bit
    # As bitsandbytes 0.50 does on CPUs with AVX-512 for rows of 16, 32 or 96: a neighbour's constant.
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *given: right(*given).roll(64))
    with pytest.raises(StageError, match="nf4 gives wrong weights on cpu where rows are 128 long, as in this model"):
        settle_quantized_layers(model)


def test_an_evaluation_leaves_gradients_as_they_are(base: Path) -> None:
    def gradient(model: nn.Module) -> torch.Tensor:
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model.train()(inputs_embeds=embedded).logits.square().sum().backward()
        return embedded.grad

    model = in_nf4(base)
    before = gradient(model)
    for layer in quantized_layers(model).values():
        layer.support_avx512bf16_for_cpu = True
    settle_quantized_layers(model)
    with torch.no_grad():
        model.eval()(IDS)
    assert torch.allclose(gradient(model), before, rtol=1e-5, atol=1e-5)


def test_a_place_where_it_does_not_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_nf4(CPU)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(StageError, match="base_quantization: nf4 cannot be used on cpu: bitsandbytes cannot be import"):
        require_nf4(CPU)


def test_a_device_where_it_fails_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(StageError, match="base_quantization: nf4 cannot be used on cuda: bitsandbytes fails there"):
        require_nf4(torch.device("cuda"))
