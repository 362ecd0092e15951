"""A real vLLM server, started by us: $STAGEWISE_TEST_VLLM names its program; without it these tests are skipped.

They take some minutes, and memory for a server.
"""

import os
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stages.lib.rl.samplers.probe import furthest, policy_logps
from stages.lib.rl.samplers.sampler import SamplerError
from stages.lib.rl.samplers.vllm_process import VllmProcess
from stages.lib.rl.samplers.vllm_sampler import VllmSampler
from stages.lib.rl.trained_policy import TrainedPolicy
from stages.lib.settings.declaration import block
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.sampler import VllmSampling
from stages.lib.settings.vllm_server import VllmServer
from tests.lib.rl.samplers.policies import move, policy_of, prompts_of, vllm_around

PROGRAM = os.environ.get("STAGEWISE_TEST_VLLM", "")
pytestmark = pytest.mark.skipif(not PROGRAM, reason="STAGEWISE_TEST_VLLM names no vllm program")
VOCABULARY = 974
TEXTS = [[5 + place % 7, *range(20, 24 + place % 9), 30 + place] for place in range(16)]
LORA = LoraSettings(**block(LoraSettings, rank=8))


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def started() -> dict[str, Any]:
    return block(VllmServer, program=PROGRAM, options=["--enforce-eager", "--max-num-seqs", "64"])


def model(folder: Path, *, tied: bool) -> Path:
    """A model with heads of 32, below which vLLM has no kernel for CPUs, and a tokenizer of words.

    Its head is large enough for vLLM to pack it, and so to keep the packed one.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{word}": word for word in range(VOCABULARY)}, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("")
    return folder


def sampled_as_pushed(policy: TrainedPolicy, sampler: VllmSampler, temperature: float, *, pushes: int) -> None:
    """Weights arrive: what is sampled has the log-probs of the policy as it is, and no longer of the one before."""
    for step in range(pushes):
        sampler.take_weights()
        episodes = sampler.sample(prompts_of(TEXTS), step, 4)
        asked, ids = [episode.prompt.ids for episode in episodes], [episode.ids for episode in episodes]
        theirs = [episode.engine_logps or [] for episode in episodes]
        assert furthest(theirs, policy_logps(policy.engine, asked, ids, temperature, sampler.batching)) < 1e-4
        assert all(len(episode.ids) == 6 or episode.ids[-1] == 1 for episode in episodes)
        assert all(episode.ended == (episode.ids[-1] == 1) for episode in episodes)
        move(policy, 0.05, step)
        assert furthest(theirs, policy_logps(policy.engine, asked, ids, temperature, sampler.batching)) > 1e-2


def test_weights_arrive_and_a_server_that_dies_is_told_of(tmp_path: Path) -> None:
    """Of a tied model, for which an untied copy is served, of an untied one, and of one with adapters, merged."""
    tied, untied = model(tmp_path / "tied", tied=True), model(tmp_path / "untied", tied=False)
    policy = policy_of(tied)
    own = vllm_around(policy, tied, tmp_path / "own", started(), TEXTS, temperature=0.7)
    sampled_as_pushed(policy, own, 0.7, pushes=3)
    assert own.weights.process is not None
    given = block(VllmServer, address=own.weights.connection.address, prompts_per_request=1, parallel_requests=2)
    policy = policy_of(untied)
    sampled_as_pushed(policy, vllm_around(policy, untied, tmp_path / "whole", given, TEXTS), 1.0, pushes=2)
    policy = policy_of(untied, LORA)
    of_lora = vllm_around(policy, untied, tmp_path / "lora", given, TEXTS, lora=LORA.model_dump())
    sampled_as_pushed(policy, of_lora, 1.0, pushes=2)
    many = prompts_of([text for _ in range(40) for text in TEXTS])
    Timer(1.0, own.weights.process.process.kill).start()
    with pytest.raises(SamplerError, match=r"does not answer /v1/completions: .* prompts of this phase are kept"):
        of_lora.sample(many, 5, 8)
    assert of_lora.home is not None
    assert of_lora.home.responses.exists()
    own.weights.process.end()


def test_a_server_of_the_tied_model_keeps_its_old_head_unless_it_is_sent(tmp_path: Path) -> None:
    """It says that it has loaded a folder of the tied model, and has not loaded the head; the probe says so."""
    tied = model(tmp_path / "tied", tied=True)
    arguments = [str(tied), "--dtype", "float32", "--logprobs-mode", "processed_logprobs"]
    environment = {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}
    server = VllmProcess(VllmServer(**started()), arguments, environment, tmp_path / "log")
    try:
        policy = policy_of(tied)
        sampler = vllm_around(policy, tied, tmp_path, block(VllmServer, address=server.connection.address), TEXTS)
        sampled_as_pushed(policy, sampler, 1.0, pushes=2)
        policy.language_model.save_pretrained(tmp_path / "again")
        server.connection.reload(tmp_path / "again")
        heads, tails = [text[:1] for text in TEXTS], [text[1:] for text in TEXTS]
        ours = policy_logps(policy.engine, heads, tails, 1.0, sampler.batching)
        with pytest.raises(SamplerError, match="keeps its head"):
            sampler.weights.require_agreement(ours, server.connection.prompt_logps(TEXTS), "keeps its head")
    finally:
        server.end()


def test_an_adapter_alone_cannot_be_verified_on_a_cpu(tmp_path: Path) -> None:
    """With an adapter vLLM 0.32 dies there when it is asked for log-probs of a prompt, and the stage says so."""
    tied = model(tmp_path / "tied", tied=True)
    policy = policy_of(tied, LORA)
    chosen = {"sampler": block(VllmSampling, pushes="adapter"), "lora": LORA.model_dump()}
    sampler = vllm_around(policy, tied, tmp_path, started(), TEXTS, **chosen)
    with pytest.raises(SamplerError, match=r"vLLM server .* refuses /v1/completions: status 500"):
        sampler.take_weights()
    assert sampler.weights.process is not None
    sampler.weights.process.end()
