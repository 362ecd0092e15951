"""Adapters against numbers worked out by hand, PEFT's own loading, and the model that they are merged into."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stages.lib.command.errors import StageError
from stages.lib.models.lora import Lora
from stages.lib.settings.lora import LoraSettings
from tests.tiny_experts import (
    EXPERTS,
    tiny_mixtral,
    tiny_mixtral_classifier,
    tiny_olmoe,
    tiny_qwen2_moe,
    tiny_qwen3_moe,
)
from tests.tiny_models import tiny_classifier, tiny_gpt2, tiny_llama

SETTINGS = {
    "rank": 2,
    "alpha": 6,
    "targets": "all-linear",
    "experts": False,
    "routers": False,
    "rslora": False,
    "base_quantization": None,
}
SOURCE = Path("models/sft")
IDS = torch.randint(3, 23, (3, 8), generator=torch.Generator().manual_seed(2))
MODELS = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_classifier])


def settings(**changed: Any) -> LoraSettings:
    return LoraSettings(**{**SETTINGS, "save_adapter": True, **changed})


def with_adapters(make: Callable[[], nn.Module], **changed: Any) -> tuple[nn.Module, Lora]:
    """A model with adapters that are not 0, in state as after training."""
    model = make()
    lora = Lora(model, settings(**changed), 5, SOURCE)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in sorted(lora.trained_names):
            model.get_parameter(name).normal_(std=0.2, generator=generator)
    return model, lora


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 2), (True, 6 / math.sqrt(2))])
def test_a_layer_computes_w_x_plus_s_b_a_x(rslora: bool, scale: float) -> None:
    model = tiny_llama()
    name = "model.layers.1.mlp.up_proj"
    weight = model.get_submodule(name).weight.detach().clone()
    lora = Lora(model, settings(targets=("layers.1.mlp.up_proj",), rslora=rslora), 0, SOURCE)
    assert list(lora.layers) == [name]
    layer = model.get_submodule(name)
    with torch.no_grad():
        layer.lora_A["default"].weight.zero_()[1, 3] = 2.0
        layer.lora_B["default"].weight[5, 1] = 7.0
    expected = weight.clone()
    expected[5, 3] += scale * 14
    merged = lora.merged(model.state_dict())[f"{name}.weight"]
    assert torch.allclose(merged, expected, atol=1e-5)
    assert torch.allclose(layer(torch.eye(16)).T, expected, atol=1e-5)


@MODELS
def test_training_starts_at_the_base_and_off_goes_back_to_it(make: Callable[[], nn.Module]) -> None:
    base = logits(make())
    model = make()
    Lora(model, settings(), 5, SOURCE)
    assert torch.equal(logits(model), base)
    model, lora = with_adapters(make)
    trained = logits(model)
    assert not torch.allclose(trained, base, atol=1e-2)
    if hasattr(model, "score"):
        with torch.no_grad():
            model.score.weight.copy_(make().score.weight)
    with lora.off():
        assert torch.equal(logits(model), base)
    if not hasattr(model, "score"):
        assert torch.equal(logits(model), trained)
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == lora.trained_names


@MODELS
def test_merged_weights_compute_what_the_adapters_do(make: Callable[[], nn.Module]) -> None:
    model, lora = with_adapters(make)
    plain = make()
    plain.load_state_dict(lora.merged(model.state_dict()))
    assert torch.allclose(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


@MODELS
def test_peft_loads_the_saved_adapter_onto_the_base(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    from peft import PeftConfig, PeftModel

    model, lora = with_adapters(make, rslora=True)
    lora.save_adapter(model.state_dict(), tmp_path, "float32")
    assert PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == "models/sft"
    theirs = PeftModel.from_pretrained(make(), tmp_path / "adapter")
    assert torch.allclose(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


def test_an_adapter_is_saved_on_request_only(tmp_path: Path) -> None:
    model, lora = with_adapters(tiny_llama, save_adapter=False)
    lora.save_adapter(model.state_dict(), tmp_path, "float32")
    assert list(tmp_path.iterdir()) == []


def test_a_start_depends_on_the_seed_and_the_layer_alone() -> None:
    def starts(seed: int, targets: Any) -> dict[str, torch.Tensor]:
        model = tiny_llama()
        lora = Lora(model, settings(targets=targets), seed, SOURCE)
        return {name: model.get_parameter(f"{name}.lora_A.default.weight") for name in lora.layers}

    torch.manual_seed(1)
    one = starts(7, "all-linear")
    torch.manual_seed(2)
    two = starts(7, ("v_proj",))
    assert len(two) == 2
    assert all(torch.equal(one[name], start) for name, start in two.items())
    assert not any(torch.equal(one[name], start) for name, start in starts(8, ("v_proj",)).items())
    values = torch.cat([start.detach().flatten() for name, start in one.items() if "down_proj" not in name])
    assert float(values.abs().max()) <= 1 / math.sqrt(16)
    assert float(values.std()) == pytest.approx(1 / math.sqrt(3 * 16), rel=0.1)


def test_only_adapters_and_a_head_are_trained() -> None:
    model, lora = with_adapters(tiny_classifier, targets=("q_proj", "down_proj"))
    assert lora.trained(model.state_dict()).keys() == {
        "score.weight",
        *(
            f"model.layers.{layer}.{module}.lora_{part}.default.weight"
            for layer in (0, 1)
            for module in ("self_attn.q_proj", "mlp.down_proj")
            for part in "AB"
        ),
    }
    # Rank 2: q_proj is 16 x 16, down_proj 16 x 24, in two layers; the head is 16.
    assert lora.counts()["trained_parameters"] == 2 * (2 * (16 + 16) + 2 * (16 + 24)) + 16 == 304
    whole = sum(weight.numel() for weight in tiny_classifier().parameters())
    assert lora.counts()["total_parameters"] == whole + 304 - 16


def test_without_settings_nothing_changes(tmp_path: Path) -> None:
    model = tiny_llama()
    lora = Lora(model, None, 5, SOURCE)
    weights = model.state_dict()
    assert all(weight.requires_grad for weight in model.parameters())
    assert lora.trained(weights) is lora.merged(weights) is weights
    assert lora.counts() == {}
    lora.save_adapter(weights, tmp_path, "float32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["q_prj", "lm_head", "embed_tokens", "proj"])
def test_an_unknown_target_is_refused_with_those_there_are(target: str) -> None:
    with pytest.raises(StageError, match=f"models/sft has no linear layer '{target}'") as error:
        Lora(tiny_llama(), settings(targets=("v_proj", target)), 5, SOURCE)
    assert "there are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, or all-linear" in str(error.value)


def test_bfloat16_adapters_are_merged_from_their_float32_masters() -> None:
    model = tiny_llama().bfloat16()
    lora = Lora(model, settings(targets=("v_proj",)), 5, SOURCE)
    name = "model.layers.0.self_attn.v_proj"
    assert model.get_parameter(f"{name}.lora_A.default.weight").dtype == torch.bfloat16
    masters = {key: torch.full(model.get_parameter(key).shape, 0.1003) for key in lora.trained_names}
    weight = lora.merged(model.state_dict() | masters)[f"{name}.weight"]
    change = weight - tiny_llama().bfloat16().get_parameter(f"{name}.weight").float()
    assert weight.dtype == torch.float32
    assert change.flatten().tolist() == pytest.approx([3 * 2 * 0.1003**2] * change.numel(), abs=1e-6)


def test_gradients_are_the_same_with_checkpointing() -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model, lora = with_adapters(tiny_llama)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()(IDS, labels=IDS).loss.backward()
        return {name: model.get_parameter(name).grad for name in lora.trained_names}

    whole, recomputed = gradients(False), gradients(True)
    assert all(float(gradient.norm()) > 0 for gradient in whole.values())
    assert all(torch.allclose(whole[name], recomputed[name], atol=1e-6) for name in whole)


MIXTURES = pytest.mark.parametrize(
    "make", [tiny_olmoe, tiny_mixtral, tiny_mixtral_classifier, tiny_qwen2_moe, tiny_qwen3_moe]
)
ALL_OF_IT = {"experts": True, "routers": True}


@MIXTURES
def test_experts_and_routers_are_adapted_merged_and_loaded_by_peft(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    from peft import PeftModel

    base = logits(make())
    model = make()
    Lora(model, settings(**ALL_OF_IT), 5, SOURCE)
    assert torch.equal(logits(model), base)
    model, lora = with_adapters(make, **ALL_OF_IT)
    trained = logits(model)
    assert not torch.allclose(trained, base, atol=1e-2)
    plain = make()
    plain.load_state_dict(lora.merged(model.state_dict()))
    assert torch.allclose(logits(plain), trained, rtol=1e-4, atol=1e-4)
    lora.save_adapter(model.state_dict(), tmp_path, "float32")
    theirs = PeftModel.from_pretrained(make(), tmp_path / "adapter")
    assert torch.allclose(logits(theirs), trained, rtol=1e-5, atol=1e-5)
    if not hasattr(model, "score"):
        with lora.off():
            assert torch.equal(logits(model), base)


def test_an_expert_has_matrices_of_its_own() -> None:
    """The update of one expert by hand; its A has rank 2, scaled by 6 / 2."""
    model = tiny_mixtral()
    name = "model.layers.1.mlp.experts"
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    lora = Lora(model, settings(experts=True), 0, SOURCE)
    weights = dict(model.state_dict())
    for part in ("A", "B"):  # down_proj's is the outer layer: A (4 · 2, 24), B (16, 2 · 4) with the experts innermost
        weights[f"{name}.lora_{part}.default.weight"] = torch.zeros_like(weights[f"{name}.lora_{part}.default.weight"])
    weights[f"{name}.lora_A.default.weight"][2 * 3 + 1, 5] = 2.0  # of the last expert
    weights[f"{name}.lora_B.default.weight"][7, EXPERTS * 1 + 3] = 7.0
    merged = lora.merged(weights)
    changed = merged[f"{name}.down_proj"] - before[f"{name}.down_proj"]
    assert changed.nonzero().tolist() == [[3, 7, 5]]
    assert changed[3, 7, 5].item() == pytest.approx(3 * 14)
    assert torch.equal(merged[f"{name}.gate_up_proj"], before[f"{name}.gate_up_proj"])


def test_all_linear_means_the_layers_that_are_linear(capsys: pytest.CaptureFixture) -> None:
    """PEFT would take the layers of a shared expert, or of a layer without experts, for those of the experts."""
    dense = with_adapters(tiny_qwen3_moe)[1].layers
    assert {name.removeprefix("model.layers.") for name in dense if ".mlp." in name} == {
        f"0.mlp.{name}_proj" for name in ("gate", "up", "down")
    }
    capsys.readouterr()
    lora = with_adapters(tiny_qwen2_moe)[1]
    assert {name.removeprefix("model.layers.0.") for name in lora.layers if ".0." in name} == {
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")),
        "mlp.shared_expert_gate",
    }
    # Per layer 4 experts of 48 x 16 and 16 x 24, and a router of 4 x 16.
    assert capsys.readouterr().err == (
        "note: params.yaml: lora: in models/sft the experts (9,216 weights) stay frozen, as lora.experts is false; "
        "the routers (128 weights) stay frozen, as lora.routers is false\n"
    )
    _, both = with_adapters(tiny_qwen2_moe, **ALL_OF_IT)
    # Rank 2 for each of 4 experts: (16 + 48) and (24 + 16); for the router 16 + 4; in two layers.
    more = both.counts()["trained_parameters"] - lora.counts()["trained_parameters"]
    assert more == 2 * 2 * (4 * (64 + 40) + 20)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("option", ["experts", "routers"])
def test_a_dense_model_has_neither(option: str) -> None:
    with pytest.raises(StageError, match=f"params.yaml: lora.{option}: models/sft has no {option} of a mixture"):
        Lora(tiny_llama(), settings(**{option: True}), 5, SOURCE)
