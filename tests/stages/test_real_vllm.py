"""A real vLLM server, started by us: $STAGEWISE_TEST_VLLM names its program; without it these tests are skipped.

They take minutes, and memory for a server beside that of the stage.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.lib.rl.samplers.probe import furthest, policy_logps
from stages.lib.rl.samplers.sampler import SamplerError
from stages.lib.rl.samplers.served_weights import read_served_weights, write_served_model
from stages.lib.rl.samplers.vllm_process import VllmProcess
from stages.lib.rl.samplers.vllm_sampler import VllmSampler
from stages.lib.settings.declaration import block
from stages.lib.settings.lora import LoraSettings
from stages.lib.settings.sampler import VllmSampling
from stages.lib.settings.vllm_server import VllmServer
from tests.lib.rl.samplers.policies import move, policy_of, prompts_of, vllm_around

PROGRAM = os.environ.get("STAGEWISE_TEST_VLLM", "")
pytestmark = pytest.mark.skipif(not PROGRAM, reason="STAGEWISE_TEST_VLLM names no vllm program")
TEXTS = [[5 + place % 7, *range(20, 24 + place % 9), 30 + place] for place in range(16)]
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1"}
Copy = Callable[..., Path]


def started(**changed: Any) -> dict[str, Any]:
    return block(VllmServer, program=PROGRAM, options=["--enforce-eager", "--max-num-seqs", "64"], **changed)


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in ON_CPU.items():
        monkeypatch.setenv(name, value)
    yield


def end(sampler: VllmSampler) -> None:
    if sampler.weights.process:
        sampler.weights.process.end()


@pytest.mark.parametrize("tied", [True, False])
def test_weights_arrive_and_log_probs_are_the_policys(tiny: Path, tmp_path: Path, tied: bool) -> None:
    model = tiny / "models/sft"
    if not tied:
        write_served_model(read_served_weights(model), model, tmp_path / "untied", "fp32")
    policy = policy_of(model if tied else tmp_path / "untied")
    sampler = vllm_around(policy, model, tmp_path, started(), TEXTS, temperature=0.7)
    try:
        for step in range(3):
            sampler.take_weights()
            episodes = sampler.sample(prompts_of(TEXTS), step, 4)
            asked, ids = [episode.prompt.ids for episode in episodes], [episode.ids for episode in episodes]
            ours = policy_logps(policy.engine, asked, ids, 0.7, sampler.batching)
            theirs = [episode.engine_logps or [] for episode in episodes]
            assert furthest(theirs, ours) < 1e-4
            assert all(len(episode.ids) == 12 or episode.ended for episode in episodes)
            move(policy, 0.02, step)
            assert furthest(theirs, policy_logps(policy.engine, asked, ids, 0.7, sampler.batching)) > 1e-2
    finally:
        end(sampler)


def test_a_server_of_the_tied_model_keeps_its_old_head_and_is_found_out(tiny: Path, tmp_path: Path) -> None:
    model = tiny / "models/sft"
    arguments = [str(model), "--dtype", "float32", "--logprobs-mode", "processed_logprobs"]
    there = VllmServer(**started())
    server = VllmProcess(there, arguments, {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}, tmp_path / "log")
    try:
        policy = policy_of(model)
        given = block(VllmServer, address=server.connection.address)
        sampler = vllm_around(policy, model, tmp_path, given, TEXTS)
        sampler.take_weights()  # those that it has
        move(policy, 0.02)
        with pytest.raises(SamplerError, match="does not have the weights that it was given; a server whose lm_head"):
            sampler.take_weights()
    finally:
        server.end()


@pytest.mark.parametrize("pushes", ["adapter", "weights"])
def test_adapters(tiny: Path, tmp_path: Path, pushes: str) -> None:
    model, lora = tiny / "models/sft", LoraSettings(**block(LoraSettings, rank=8))
    policy = policy_of(model, lora)
    changed = {"sampler": block(VllmSampling, pushes=pushes), "lora": lora.model_dump()}
    sampler = vllm_around(policy, model, tmp_path, started(), TEXTS, **changed)
    try:
        for step in range(3):
            sampler.take_weights()
            episodes = sampler.sample(prompts_of(TEXTS), step, 4)
            asked, ids = [episode.prompt.ids for episode in episodes], [episode.ids for episode in episodes]
            theirs = [episode.engine_logps or [] for episode in episodes]
            assert furthest(theirs, policy_logps(policy.engine, asked, ids, 1.0, sampler.batching)) < 1e-4
            move(policy, 0.1, step)
            assert furthest(theirs, policy_logps(policy.engine, asked, ids, 1.0, sampler.batching)) > 1e-2
    finally:
        end(sampler)
