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


def test_a_killed_run_goes_on_with_the_responses_that_it_had(
    copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    with VllmStandIn(tiny / "models/sft") as server:
        whole = project(copy_of_tiny("whole"), server)
        call(whole, STAGE)
        asked = server.asked
    assert asked == 2 * 2  # requests of a phase of four prompts
    assert server.pushes == 2
    with VllmStandIn(tiny / "models/sft") as server:
        killed = project(copy_of_tiny("killed"), server)
        cut_short(killed, STAGE, monkeypatch, after=6, kind=Learner, method="update")  # in the second phase
        assert server.asked == asked
        call(killed, STAGE)
        assert server.asked == asked
        assert server.pushes == 3  # once more to be sure
    assert outs(killed, STAGE) == outs(whole, STAGE)


def test_a_server_that_dies_ends_the_stage_in_one_line_and_no_response_is_lost(
    copy_of_tiny: Copy, capsys: pytest.CaptureFixture, tiny: Path
) -> None:
    folder = copy_of_tiny()
    with VllmStandIn(tiny / "models/sft", dies_at=3) as server:  # at the second request of the second phase
        said = refusal(project(folder, server), STAGE, capsys)
    assert f"error: vLLM server {server.address} does not answer /v1/completions: " in said
    assert said.endswith("The responses to 2 of 4 prompts of this phase are kept")
    with VllmStandIn(tiny / "models/sft") as server:
        call(project(folder, server), STAGE)
    assert server.asked == 1
    assert "resuming from step 1" in capsys.readouterr().out
