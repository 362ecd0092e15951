"""AdamW of bitsandbytes: near torch's own in less memory, saved without a pickle, refused where it fails."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from stages.lib.command.errors import StageError
from stages.lib.compute.engine.choice import new_engine
from stages.lib.compute.engine.torch import TorchEngine
from tests.lib.compute.test_engine import ALONE, MeanLogProb, flat, new, settings, train
from tests.tiny_models import tiny_llama


def llama(seed: int = 0) -> LlamaForCausalLM:
    """With matrices of 4,096 numbers and more, which are held in 8 bits, and smaller ones."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=80, num_key_value_heads=1, tie_word_embeddings=False, **sizes))


def states_of(engine: TorchEngine) -> dict[str, dict[str, torch.dtype]]:
    return {
        name: {key: engine.full_state(name, key).dtype for key in engine.saved_states(name)} for name in engine.trained
    }


def test_small_weights_take_the_very_steps_of_adamw() -> None:
    """All weights of this model have fewer than 4,096 numbers, so their moments are in float32, decay included."""
    theirs, ours = tiny_llama(), tiny_llama()
    train(new(MeanLogProb(theirs), 5), 5)
    train(new(MeanLogProb(ours), 5, moments="8bit"), 5)
    assert torch.allclose(flat(ours.parameters()), flat(theirs.parameters()), atol=1e-5)


def test_large_matrices_are_held_in_8_bits_and_embeddings_are_not() -> None:
    engine = new(MeanLogProb(llama()), 1, moments="8bit")
    train(engine, 1)
    states = states_of(engine)
    whole, eight = (
        dict.fromkeys(("state1", "state2"), torch.float32),
        dict.fromkeys(("state1", "state2"), torch.uint8) | dict.fromkeys(("absmax1", "absmax2"), torch.float32),
    )
    assert states["model.model.embed_tokens.weight"] == whole  # 5,120 numbers
    assert states["model.lm_head.weight"] == eight
    assert states["model.model.layers.0.self_attn.q_proj.weight"] == eight  # 4,096
    assert states["model.model.layers.0.self_attn.k_proj.weight"] == whole  # 2,048


def test_training_in_8_bits_stays_near_that_in_32() -> None:
    start, theirs, ours = (flat(llama().parameters()), llama(), llama())
    train(new(MeanLogProb(theirs), 20), 20)
    train(new(MeanLogProb(ours), 20, moments="8bit"), 20)
    moved = flat(theirs.parameters()) - start
    difference = flat(ours.parameters()) - flat(theirs.parameters())
    assert 1e-4 < float(difference.norm() / moved.norm()) < 0.15
    losses = [MeanLogProb(model)(torch.arange(40).view(4, 10)).item() for model in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_is_the_same_as_going_on(dtype: torch.dtype, tmp_path: Path) -> None:
    def eight(model: nn.Module) -> TorchEngine:
        return new(MeanLogProb(model.to(dtype)), 4, moments="8bit")

    through, first, second = eight(llama()), eight(llama()), eight(llama(seed=9))
    train(through, 4)
    train(first, 2)
    state = copy.deepcopy(first.state_dict())
    save_file({name: tensor.clone() for name, tensor in first.tensors()}, tmp_path / "tensors.safetensors")
    second.load_state_dict(state, load_file(tmp_path / "tensors.safetensors").__getitem__)
    train(second, 2)
    assert torch.equal(flat(second.masters.values()), flat(through.masters.values()))
    assert torch.equal(flat(second.trained.values()), flat(through.trained.values()))


def test_a_checkpoint_of_another_model_is_refused() -> None:
    engine, other = (new(MeanLogProb(llama()), 2, moments="8bit") for _ in range(2))
    train(engine, 1)
    tensors = dict(engine.tensors())
    wrong = next(name for name in tensors if name.endswith("absmax2"))
    tensors[wrong] = tensors[wrong][1:]
    with pytest.raises(StageError, match=f"the checkpoint holds {wrong} in shape"):
        other.load_state_dict(engine.state_dict(), tensors.__getitem__)


@pytest.mark.parametrize("moments", ["paged", "paged_8bit"])
def test_a_cpu_pages_its_memory_by_itself(moments: str) -> None:
    with pytest.raises(StageError, match=f"optimizer.moments: {moments} cannot be used on cpu, which pages"):
        new(MeanLogProb(tiny_llama()), 1, moments=moments)


def test_without_bitsandbytes_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    expected = "^params.yaml: optimizer.moments: 8bit cannot be used on cpu: bitsandbytes cannot be imported .*float32$"
    with pytest.raises(StageError, match=expected):
        new(MeanLogProb(tiny_llama()), 1, moments="8bit")


def test_kernels_that_fail_or_lie_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.optim.optimizer import Optimizer2State

    def broken(*_: object) -> None:
        raise RuntimeError("no kernel\nhere")

    for step, expected in ((broken, "bitsandbytes fails there .no kernel here."), (lambda *_: None, "a wrong step")):
        monkeypatch.setattr(Optimizer2State, "update_step", step)
        with pytest.raises(StageError, match=f"optimizer.moments: 8bit cannot be used on cpu: .*{expected}"):
            new(MeanLogProb(tiny_llama()), 1, moments="8bit")


def test_deepspeed_is_refused() -> None:
    runtime = new(MeanLogProb(tiny_llama()), 1).runtime.model_copy(update={"engine": "deepspeed"})
    with pytest.raises(StageError, match=r"optimizer\.moments: 8bit needs plain torch, not DeepSpeed"):
        new_engine(tiny_llama(), settings(moments="8bit"), 1, runtime, ALONE)
