"""Training with responses of a vLLM server's stand-in: a kill, and a server that dies.

The server itself is in test_real_vllm.py, where its environment is installed; what else can be wrong with one is in
tests/lib/rl/samplers/test_vllm_weights.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.lib.rl.learner import Learner
from stages.lib.settings.declaration import block
from stages.lib.settings.sampler import VllmSampling
from tests.lib.rl.samplers.vllm_stand_in import VllmStandIn, settings_of
from tests.proofs.tiny_projects import remove_outs
from tests.stages.test_resume import cut_short, outs
from tests.stages.tiny_pipeline import call, change_entries, read_yaml, refusal, write_yaml

Copy = Callable[..., Path]
STAGE = "train_grpo@grpo"


def project(folder: Path, server: VllmStandIn, **changed: Any) -> Path:
    """A project whose two phases of GRPO sample with a server."""
    own = {"sampler": block(VllmSampling, tolerance=1e-4), "iterations": 2, "held_out": None, **changed}
    change_entries(folder, {"train_grpo": own})
    runtime = read_yaml(folder / "runtime.yaml")
    runtime["default"] |= {"checkpoint_seconds": 0.0, "vllm": settings_of(server.address, prompts_per_request=2)}
    runtime["default"]["vllm"]["parallel_requests"] = 1  # in order, so that the stand-in's draws are
    write_yaml(folder / "runtime.yaml", runtime)
    return folder


def test_a_dead_server_and_a_kill_lose_no_response(
    copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tiny: Path
) -> None:
    sft = tiny / "models/sft"
    with VllmStandIn(sft) as server:
        whole = project(copy_of_tiny("whole"), server)
        call(whole, STAGE)
    assert server.asked == 2 * 2  # requests of a phase of four prompts
    assert server.pushes == 2
    folder = copy_of_tiny("cut")
    with VllmStandIn(sft, dies_at=3) as server:  # at the second request of the second phase
        remove_outs(folder, STAGE)
        said = refusal(project(folder, server), STAGE, capsys)
    assert f"error: vLLM server {server.address} does not answer /v1/completions: " in said
    assert said.endswith("The responses to 2 of 4 prompts of this phase are kept")
    with VllmStandIn(sft, asked=3) as server:
        cut_short(project(folder, server), STAGE, monkeypatch, after=2, kind=Learner, method="update")
        assert "resuming from step 1" in capsys.readouterr().out
        assert server.asked == 4
        call(folder, STAGE)
        assert server.asked == 4
        assert server.pushes == 2  # to be sure, in each start
    assert outs(folder, STAGE) == outs(whole, STAGE)
