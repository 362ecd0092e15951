"""Loading a model folder: what a process that reads no weights has in common with one that does."""

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from stages.lib.command.errors import StageError
from stages.lib.models import pretrained
from stages.lib.settings.runtime import read_runtime
from tests.real_files import PROJECT
from tests.tiny_models import CPU, tiny_gpt2, tiny_llama

RUNTIME = read_runtime("train_sft", PROJECT / "runtime.yaml")
LOADING = pretrained.Loading("fp32", RUNTIME, CPU)


def folder_of(kind: str, tmp_path: Path) -> Path:
    model = tiny_gpt2() if kind == "gpt2" else tiny_llama()
    if kind == "tied llama":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_a_model_without_weights_has_the_shape_of_the_loaded_one(
    kind: str, dtype: torch.dtype, auto_class: type, tmp_path: Path
) -> None:
    path = folder_of(kind, tmp_path)
    options = {"dtype": dtype, "attn_implementation": "sdpa", "local_files_only": True}
    if auto_class is AutoModelForSequenceClassification:
        options["num_labels"] = 1
    loaded = auto_class.from_pretrained(path, **options)
    empty = pretrained._without_weights(auto_class, path, **options)
    # Shards are handed out by place in the list of parameters: the same order, and tied weights once.
    shapes = [(name, weight.shape, weight.dtype) for name, weight in loaded.named_parameters()]
    assert [(name, weight.shape, weight.dtype) for name, weight in empty.named_parameters()] == shapes
    assert empty.state_dict().keys() == loaded.state_dict().keys()
    buffers = dict(loaded.named_buffers())
    assert dict(empty.named_buffers()).keys() == buffers.keys()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in empty.named_buffers())
    with torch.no_grad():
        for weight, value in zip(empty.parameters(), loaded.parameters(), strict=True):
            weight.copy_(value)
    ids = torch.arange(8)[None] + 1
    outs = [model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)) for model in (loaded, empty)]
    assert torch.equal(outs[0].logits, outs[1].logits)


@pytest.mark.parametrize(("precision", "refused"), [("fp32", True), ("bf16", False)])
def test_flash_attention_is_for_bf16(precision: str, refused: bool) -> None:
    runtime = read_runtime("train_sft", PROJECT / "runtime.yaml").model_copy(update={"attention": "flash_attention_2"})
    with pytest.raises(StageError, match="computes in bf16, not in fp32") if refused else nullcontext():
        pretrained.require_attention_kernel(runtime, precision)
    with pytest.raises(StageError, match="needs a GPU; set device: cuda"):
        pretrained.require_attention_kernel(runtime.model_copy(update={"device": "cpu"}), precision)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_flash_attention_without_its_package_is_refused(tmp_path: Path) -> None:
    # With the package `kernels` transformers would fetch one from the Hub in its place.
    runtime = RUNTIME.model_copy(update={"attention": "flash_attention_2", "device": "auto"})
    with pytest.raises(
        StageError, match=r"runtime\.yaml: attention: flash_attention_2 cannot be used here: the package"
    ):
        pretrained.load_language_model(folder_of("llama", tmp_path), pretrained.Loading("bf16", runtime, CPU))


@pytest.mark.parametrize("kind", ["gpt_neo", "bloom"])
def test_an_attention_kernel_that_an_architecture_lacks_is_refused_by_our_key(kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 23, "hidden_size": 16, "num_heads": 2, "n_head": 2}
    layers = {"gpt_neo": {"num_layers": 1, "attention_types": [[["global"], 1]]}, "bloom": {"n_layer": 1}}[kind]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **layers)).save_pretrained(tmp_path)
    message = (
        rf"^runtime\.yaml: attention: models of type {kind}, as .* is, do not compute with sdpa; set attention: eag"
    )
    for load in (pretrained.load_language_model, partial(pretrained.new_classifier, seed=0)):
        with pytest.raises(StageError, match=message) as refused:
            load(tmp_path, LOADING)
        assert len(str(refused.value)) < 300
    eager = RUNTIME.model_copy(update={"attention": "eager"})
    assert pretrained.load_language_model(tmp_path, replace(LOADING, runtime=eager))


def test_an_architecture_without_a_classifier_makes_no_reward_model(tmp_path: Path) -> None:
    sizes = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = AutoConfig.for_model("cohere", num_attention_heads=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        StageError, match="has no sequence classifier for models of type cohere, so no reward"
    ) as refused:
        pretrained.new_classifier(tmp_path, LOADING, 0)
    assert len(str(refused.value)) < 400
    assert pretrained.load_language_model(tmp_path, LOADING) is not None


def test_weights_without_a_place_in_the_model_are_refused(tmp_path: Path) -> None:
    path = folder_of("llama", tmp_path)
    pretrained.new_classifier(path, LOADING, 0)  # which has no place for lm_head.weight
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "layer_types": None}))
    message = r"holds 9 weights for which .* has no place, the first is model\.layers\.1\.input_layernorm\.weight: "
    with pytest.raises(StageError, match=message):
        pretrained.load_language_model(path, LOADING)


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    path = folder_of("llama", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 25}))
    message = r": 6 weights are missing or of another shape .*, the first is model\.layers\.0\.mlp\.down_proj\.weight$"
    for load in (pretrained.load_language_model, partial(pretrained.new_classifier, seed=0)):
        with pytest.raises(StageError, match=message):
            load(path, LOADING)


def test_pickles_and_adapters_are_not_loaded(tmp_path: Path) -> None:
    path = folder_of("llama", tmp_path)
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model", "peft_type": "LORA"}')
    with pytest.raises(StageError, match="holds an adapter"):
        pretrained.load_language_model(path, LOADING)
    (path / "adapter_config.json").unlink()
    torch.save(tiny_llama().state_dict(), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(StageError, match=r"its weights as a pickle alone \(pytorch_model\.bin\)"):
        pretrained.load_language_model(path, LOADING)


def test_a_kernel_that_a_configuration_names_is_not_used(tmp_path: Path) -> None:
    """It may be one of the Hub's, which is code."""
    path = folder_of("llama", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"attn_implementation": "some/kernel"}))
    assert pretrained.load_language_model(path, LOADING).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("content", ["[]", '{"model_type": 5}', '{"model_type": "llama", "vocab_size": []}', "\\"])
def test_a_configuration_that_makes_no_sense(content: str, tmp_path: Path) -> None:
    path = folder_of("llama", tmp_path)
    (path / "config.json").write_text(content)
    with pytest.raises(StageError, match=r"config\.json"):
        pretrained.load_language_model(path, LOADING)
