"""train_grpo and train_ppo with responses drawn a phase ahead, in a process of its own; what cannot be is refused."""

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from stages.lib.rl.samplers import asynchronous
from stages.lib.rl.samplers.sampling_process import SamplingProcess
from stages.lib.rl.samplers.sampling_worker import Drawn, SamplerStart, SamplingWorker, read_start
from stages.lib.settings.declaration import block
from stages.lib.settings.dynamic_sampling import DynamicSampling
from stages.lib.settings.engine_correction import NoEngineCorrection, SequenceTruncated
from tests.lib.rl.samplers.vllm_stand_in import VllmStandIn
from tests.stages.test_resume import cut_short, outs
from tests.stages.test_training import curve
from tests.stages.test_vllm_sampler import project
from tests.stages.tiny_pipeline import call, change, read_yaml, refusal
from tests.tables import rollout_rows

Copy = Callable[..., Path]
AHEAD = {"asynchronous": True, "engine_correction": block(SequenceTruncated)}


class InThisProcess:
    """What the process computes, when it is asked for and without the seconds that starting one takes."""

    def __init__(self, start: SamplerStart, weights: Path) -> None:
        self.worker, self.file = SamplingWorker(read_start(start.line())), weights

    def begin(self, weights: Mapping[str, Any], prompts: Sequence[Any], step: int, samples: int) -> None:
        self.file.parent.mkdir(exist_ok=True)
        save_file(dict(weights), self.file)
        asked = {"weights": str(self.file), "prompts": [[prompt.row, prompt.ids] for prompt in prompts]}
        self.drawn = self.worker.drawn({**asked, "step": step, "samples": samples})

    def is_ready(self, _seconds: float) -> bool:
        return True

    def take(self) -> list[Drawn]:
        return self.drawn

    def close(self) -> None:
        self.file.unlink(missing_ok=True)


def test_a_phase_is_drawn_while_the_one_before_is_learnt_from_and_a_kill_changes_nothing(
    copy_of_tiny: Copy, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, whole, folder = "train_grpo@grpo", copy_of_tiny("whole"), copy_of_tiny()
    for one in (whole, folder):
        change(one / "params.yaml", {"train_grpo": {"grpo": AHEAD}})
        change(one / "runtime.yaml", {"default": {"checkpoint_seconds": 0.0}})
    call(whole, stage)
    rows = curve(whole, "train_grpo")
    updates = rows["policy/updates"][0]
    assert updates > 0
    assert rows["engine/staleness"].tolist() == [0, updates, updates]
    assert rows["engine/logp_difference"][0] < 1e-5 < 1e-3 < rows["engine/logp_difference"][1]
    ours, theirs = rollout_rows(whole, "grpo"), rollout_rows(tiny, "grpo")
    assert [row["row"] for row in ours] == [row["row"] for row in theirs]
    assert [row["response_ids"] for row in ours[:8]] == [row["response_ids"] for row in theirs[:8]]
    monkeypatch.setattr(asynchronous, "SamplingProcess", InThisProcess)
    cut_short(folder, stage, monkeypatch, after=2)
    call(folder, stage)
    assert outs(folder, stage) == outs(whole, stage)
    assert not [*(whole / ".scratch").rglob("policy.safetensors")]


def test_ppo_with_adapters(copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapters alone are handed on; a policy that is not learnt from yet is not stale."""
    from stages.lib.settings.lora import LoraSettings

    monkeypatch.setattr(asynchronous, "SamplingProcess", InThisProcess)
    folder = copy_of_tiny()
    lora = block(LoraSettings, rank=2, alpha=4)
    chosen = AHEAD | {"lora": lora, "critic_warmup_iterations": 1, "epochs": 1}
    change(folder / "params.yaml", {"train_ppo": {"ppo": chosen}})
    call(folder, "train_ppo@ppo")
    rows = curve(folder, "train_ppo")
    assert rows["engine/staleness"].tolist() == [0, 0, rows["policy/updates"][1]]
    assert (rows["engine/logp_difference"][:2] < 1e-5).all()
    assert rows["engine/logp_difference"][2] > 1e-5


def test_a_process_that_is_killed_is_one_line_and_loses_no_update(
    copy_of_tiny: Copy, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, begin = copy_of_tiny(), SamplingProcess.begin
    change(folder / "params.yaml", {"train_grpo": {"grpo": AHEAD}})
    change(folder / "runtime.yaml", {"default": {"checkpoint_seconds": 0.0}})

    def begin_and_kill(self: SamplingProcess, *asked: Any) -> None:
        begin(self, *asked)
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)

    monkeypatch.setattr(SamplingProcess, "begin", begin_and_kill)
    assert refusal(folder, "train_grpo@grpo", capsys) == (
        "error: the process that samples a phase ahead has ended with -9; start the stage again"
    )
    monkeypatch.setattr(asynchronous, "SamplingProcess", InThisProcess)
    call(folder, "train_grpo@grpo")
    assert "resuming from step 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine_correction": block(NoEngineCorrection)}, "responses are of weights a phase old"),
        ({"sampler": {"type": "transformers"}}, "draws with the model that is trained"),
        ({"dynamic_sampling": block(DynamicSampling)}, "set it to null"),
    ],
)
def test_what_cannot_be_drawn_ahead_is_refused(
    copy_of_tiny: Copy, capsys: pytest.CaptureFixture, values: dict[str, Any], message: str
) -> None:
    folder = copy_of_tiny()
    change(folder / "params.yaml", {"train_grpo": {"grpo": AHEAD | values}})
    assert message in refusal(folder, "train_grpo@grpo", capsys)


def test_a_server_is_asked_a_phase_ahead(copy_of_tiny: Copy, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It draws with the weights that it was given before; a held-out evaluation, which changes them, waits for it."""
    held_out = read_yaml(tiny / "params.yaml")["train_grpo"]["grpo"]["held_out"] | {"every": 1, "prompts": 4}
    stage, found = "train_grpo@grpo", []
    for name in ("whole", "killed"):
        with VllmStandIn(tiny / "models/sft") as server:
            folder = project(copy_of_tiny(name), server, **AHEAD, held_out=held_out)
            if name == "killed":
                cut_short(folder, stage, monkeypatch, after=1)
            call(folder, stage)
            found.append((server.asked, outs(folder, stage)))
    rows = curve(folder, "train_grpo")
    assert rows["engine/staleness"].tolist() == [0, rows["policy/updates"][0]]
    assert rows["engine/logp_difference"][0] < 1e-4 < rows["engine/logp_difference"][1]
    assert found[0] == found[1]  # nothing is asked for again, or written otherwise
