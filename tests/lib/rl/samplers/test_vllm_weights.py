"""Weights on a server: that they arrive, and that a server which says so and lies is found out."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stages.lib.rl.samplers.probe import OF_NOTHING, furthest, policy_logps, unchanged_weights
from stages.lib.rl.samplers.sampler import SamplerError
from stages.lib.rl.samplers.served_weights import write_served_model
from stages.lib.settings.declaration import block
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.sampler import VllmSampling
from stages.lib.settings.vllm_server import VllmServer
from tests.lib.rl.samplers.policies import move, policy_of, prompts_of, vllm_around, with_tokenizer
from tests.lib.rl.samplers.vllm_stand_in import VllmStandIn, settings_of
from tests.tiny_models import tiny_gpt2, tiny_llama

TEXTS = [[3, 4, 5, 6, 7], [8, 9], [9, 10, 11]]


def tied_llama() -> LlamaForCausalLM:
    config = tiny_llama().config
    return LlamaForCausalLM(LlamaConfig(**config.to_dict() | {"tie_word_embeddings": True}))


def folder_of(model: nn.Module, path: Path) -> Path:
    model.save_pretrained(path)
    return with_tokenizer(path)


@pytest.mark.parametrize("make", [tiny_llama, tied_llama, tiny_gpt2])
def test_weights_arrive_and_responses_are_the_policys(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    folder = folder_of(make(), tmp_path / "model")
    policy = policy_of(folder)
    with VllmStandIn(folder) as server:
        sampler = vllm_around(policy, folder, tmp_path, settings_of(server.address), TEXTS, temperature=0.7)
        for step in range(2):
            move(policy, 0.1, step)
            sampler.take_weights()
            sampler.take_weights()  # nothing has changed since
            episodes = sampler.sample(prompts_of(TEXTS), step, 2)
            assert server.pushes == step + 1
            places = [(episode.prompt.row, episode.sample) for episode in episodes]
            assert places == [(row, sample) for row in range(3) for sample in range(2)]
            asked, ids = [episode.prompt.ids for episode in episodes], [episode.ids for episode in episodes]
            ours = policy_logps(policy.engine, asked, ids, 0.7, sampler.batching)
            assert furthest([episode.engine_logps or [] for episode in episodes], ours) < 1e-5
            assert all(len(episode.ids) == 6 or episode.ended for episode in episodes)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"keeps_head": True}, "does not have the weights that it was given; a server whose lm_head is its embedding"),
        ({"before_temperature": True}, "must run with --logprobs-mode processed_logprobs. Of "),
    ],
)
def test_a_server_that_does_otherwise_than_it_says(fault: dict[str, bool], said: str, tmp_path: Path) -> None:
    folder = folder_of(tiny_llama(), tmp_path / "model")
    policy = policy_of(folder)
    with VllmStandIn(folder, **fault) as server:
        sampler = vllm_around(policy, folder, tmp_path, settings_of(server.address), TEXTS, temperature=0.7)
        move(policy, 0.1)
        with pytest.raises(SamplerError, match=said):
            sampler.take_weights()


@pytest.mark.parametrize("pushes", ["weights", "adapter"])
def test_an_adapter_is_pushed_alone_or_merged(pushes: str, tmp_path: Path) -> None:
    """The probe moves with it, and the base that is the reference stays as it is."""
    folder = folder_of(tiny_llama(), tmp_path / "model")
    lora = LoraSettings(**block(LoraSettings, rank=4))
    policy, base = policy_of(folder, lora), policy_of(folder)
    with VllmStandIn(folder) as server:
        chosen = block(VllmSampling, pushes=pushes)
        changed = {"sampler": chosen, "lora": lora.model_dump()}
        sampler = vllm_around(policy, folder, tmp_path, settings_of(server.address), TEXTS, **changed)
        for step in range(2):
            move(policy, 0.3, step)
            sampler.take_weights()
    assert ("/v1/load_lora_adapter" in server.seen) == (pushes == "adapter")
    heads, tails = [text[:1] for text in TEXTS], [text[1:] for text in TEXTS]
    ours, reference = (policy_logps(one.engine, heads, tails, 1.0, sampler.batching) for one in (policy, base))
    with policy.lora.off():
        assert furthest(policy_logps(policy.engine, heads, tails, 1.0, sampler.batching), reference) == 0
    assert furthest(ours, reference) > 0.1


@pytest.mark.parametrize("keeps_head", [False, True])
def test_a_policy_that_has_hardly_moved_is_told_by_checksums(keeps_head: bool, tmp_path: Path) -> None:
    folder = folder_of(tiny_llama(), tmp_path / "model")
    policy = policy_of(folder)
    with VllmStandIn(folder, keeps_head=keeps_head) as server:
        sampler = vllm_around(policy, folder, tmp_path, settings_of(server.address), TEXTS)
        sampler.take_weights()
        assert "/weight_checker" not in server.seen
        policy.engine.changes += 1  # as after updates of a value head alone
        sampler.take_weights()
        move(policy, 1e-6)
        if keeps_head:
            with pytest.raises(SamplerError, match=r"of lm_head.weight its checksum has not changed"):
                sampler.take_weights()
        else:
            sampler.take_weights()


def test_fused_weights_by_hand() -> None:
    ours = {f"model.layers.0.attn.{name}.weight": True for name in "qkv"} | {"model.norm.weight": False}
    before = {"rank0:model.layers.0.attn.qkv.weight": "a", "rank0:model.norm.weight": "b", "rank0:lm_head.weight": "c"}
    after = {"rank0:model.layers.0.attn.qkv.weight": "d", "rank0:model.norm.weight": "b", "rank0:lm_head.weight": "e"}
    assert unchanged_weights(ours, before, after) == {"lm_head.weight": "no weight of ours is of its module"}
    del after["rank0:lm_head.weight"]
    assert unchanged_weights(ours, before, after) == {}
    assert unchanged_weights(ours, before, before | after | {"rank0:model.layers.0.attn.qkv.weight": "a"}) == {
        "model.layers.0.attn.qkv.weight": "its checksum has not changed",
        "lm_head.weight": "no weight of ours is of its module",
    }
    after["rank0:model.norm.weight"] = OF_NOTHING
    assert unchanged_weights(ours, before, after) == {"model.norm.weight": "its checksum is one of no bytes"}


def test_distances_by_hand() -> None:
    assert furthest([[-1.0, -2.0], []], [[-1.25, -2.0], []]) == 0.25
    assert furthest([[-1.0]], [[float("nan")]]) == float("inf")
    assert furthest([], []) == 0.0


def test_a_served_folder_is_the_untied_model(tmp_path: Path) -> None:
    model = tied_llama()
    write_served_model(model.state_dict(), folder_of(model, tmp_path / "model"), tmp_path / "served", "fp32")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    assert served.lm_head.weight is not served.model.embed_tokens.weight
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(served(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"program": "no/such/vllm"}, "runtime.yaml: vllm.program: no/such/vllm is not there"),
        ({"program": "false"}, r"vLLM server cannot be started; its process has ended with 1 \(see "),
        ({"address": "http://127.0.0.1:9"}, "runtime.yaml: vllm.address: no vLLM server answers at http://127.0.0.1:9"),
    ],
)
def test_where_no_server_is_there(changed: dict[str, str], said: str, tmp_path: Path) -> None:
    folder = folder_of(tiny_llama(), tmp_path / "model")
    sampler = vllm_around(policy_of(folder), folder, tmp_path, block(VllmServer, **changed), TEXTS)
    with pytest.raises(SamplerError, match=said):
        sampler.take_weights()
