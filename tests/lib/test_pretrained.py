"""Loading a model folder: what a process that reads no weights has in common with one that does."""

from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from stages.lib import pretrained
from stages.lib.errors import StageError
from stages.lib.settings.runtime import read_runtime
from tests.real_files import PROJECT
from tests.tiny_models import CPU, tiny_gpt2, tiny_llama


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
    runtime = replace(read_runtime("train_sft", PROJECT / "runtime.yaml"), attention="flash_attention_2")
    with pytest.raises(StageError, match="computes in bf16, not in fp32") if refused else nullcontext():
        pretrained.require_attention_kernel(runtime, precision)
    with pytest.raises(StageError, match="needs a GPU; set device: cuda"):
        pretrained.require_attention_kernel(replace(runtime, device="cpu"), precision)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_flash_attention_without_its_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With the package `kernels` transformers would fetch one from the Hub in its place.
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda: False)
    runtime = replace(read_runtime("train_sft", PROJECT / "runtime.yaml"), attention="flash_attention_2", device="auto")
    with pytest.raises(StageError, match=r"runtime\.yaml: attention: flash_attention_2 cannot be used here"):
        pretrained.load_language_model(folder_of("llama", tmp_path), "bf16", runtime, CPU)
