"""Stages whose passes do not fit into memory: each ends with one line, or repeats its step at half the size."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stages.lib.command.errors import StageError
from stages.lib.compute.processes import Processes
from stages.lib.models.scalar_scores import SequenceScores, TokenScores
from stages.lib.models.token_logprobs import TokenLogProbs
from stages.lib.runs.stage_run import StageRun
from stages.lib.runs.training_run import TrainingRun
from stages.lib.settings.runtime import read_runtime
from tests.pipeline.graph import computing_stages
from tests.proofs.tiny_projects import outs_of, remove_outs
from tests.stages.tiny_pipeline import call, change, contents, inside, refusal

Copy = Callable[..., Path]
STAGES = (*computing_stages(), "evaluate@ppo")
WITH_ROLLOUTS = [stage for stage in STAGES if any(out.startswith("data/rollouts/") for out in outs_of(stage))]
# Padded tokens of a pass that fit, and the micro_batch_tokens at which all do.
FITS, SIZE = 700, 512
FITS_OF_ROLLOUTS, SIZE_OF_ROLLOUTS = 260, 256  # their sequences are shorter
ROWS_FIT = 3  # of which a token is sampled
# A step is then cut into as few passes as the memory allows, the first of which does not fit.
DEAR_PASSES = {"pass_cost": {device: {"overhead": 10**6, "attention": 10**6} for device in ("cpu", "gpu")}}


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> None:
    """A stage collects garbage wherever memory runs out; what the tests before have left need not be looked through."""
    gc.collect()
    gc.freeze()


class Hungry:
    """Modules that ask for more memory than there is once a pass has more padded tokens than fit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fits: int = FITS) -> None:
        self.fits = fits
        self.failures = 0
        for kind in (TokenLogProbs, SequenceScores, TokenScores):
            monkeypatch.setattr(kind, "forward", self.limited(kind.forward))

    def limited(self, forward: Callable) -> Callable:
        def limited_forward(module: nn.Module, input_ids: torch.Tensor, *inputs: Any, **options: Any) -> Any:
            sampling = options == {"run": "next_logits"}
            if input_ids.shape[0] > ROWS_FIT if sampling else input_ids.numel() > self.fits:
                self.failures += 1
                torch.empty(2**50, dtype=torch.uint8)
            return forward(module, input_ids, *inputs, **options)

        return limited_forward


def fits_of(stage: str) -> int:
    return FITS_OF_ROLLOUTS if stage in WITH_ROLLOUTS else FITS


def outs(folder: Path, stage: str) -> dict[str, bytes]:
    return {f"{out}/{name}": text for out in outs_of(stage) for name, text in contents(folder / out).items()}


def as_numbers(value: Any) -> Any:
    """JSON in which numbers are equal if they are so but for rounding."""
    if isinstance(value, dict):
        return {key: as_numbers(item) for key, item in value.items()}
    return pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, int | float) else value


@pytest.mark.parametrize("stage", STAGES)
def test_by_default_a_stage_stops_with_one_line(
    copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, stage: str
) -> None:
    folder = copy_of_tiny()
    hungry = Hungry(monkeypatch, fits_of(stage))
    before = outs(folder, stage)
    message = refusal(folder, stage, capsys)
    assert message.startswith("error: out of memory (")
    for words in ("lower runtime.yaml: micro_batch_tokens (it is 8192)", "generation_batch_size (128)", "retry"):
        assert words in message
    assert hungry.failures == 1
    assert outs(folder, stage) == before


@pytest.mark.parametrize("stage", STAGES)
def test_with_retry_it_ends_as_with_the_smaller_size_from_the_start(
    copy_of_tiny: Copy, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, stage: str
) -> None:
    folder, small = copy_of_tiny(), copy_of_tiny("small")
    change(folder / "runtime.yaml", {"default": DEAR_PASSES | {"on_out_of_memory": "retry"}})
    size = SIZE_OF_ROLLOUTS if stage in WITH_ROLLOUTS else SIZE
    change(small / "runtime.yaml", {"default": DEAR_PASSES | {"micro_batch_tokens": size, "generation_batch_size": 2}})
    hungry = Hungry(monkeypatch, fits_of(stage))
    call(folder, stage)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == hungry.failures > 0
    assert sum(f"with micro_batch_tokens {size}, which stays in force" in line for line in warnings) == 1
    sampled = stage in (*WITH_ROLLOUTS, "evaluate@ppo")
    assert sum("with generation_batch_size 2, which stays" in line for line in warnings) == sampled
    call(small, stage)
    assert hungry.failures == len(warnings)
    # The sizes were found before the first step was taken, so that no step was taken with others.
    assert outs(folder, stage) == outs(small, stage)
    for path in (out for out in outs_of(stage) if out.endswith(".json")):
        ours, whole = (json.loads((project / path).read_text()) for project in (folder, tiny))
        assert ours == as_numbers(whole)


class Cut(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("stage", ["train_ppo@ppo"])
def test_a_run_that_was_killed_goes_on_with_what_has_fitted(
    copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, stage: str
) -> None:
    folder, undisturbed = copy_of_tiny(), copy_of_tiny("undisturbed")
    for project in (folder, undisturbed):
        values = DEAR_PASSES | {"on_out_of_memory": "retry", "checkpoint_seconds": 0.0}
        change(project / "runtime.yaml", {"default": values})
    hungry = Hungry(monkeypatch, fits_of(stage))
    call(undisturbed, stage)
    remove_outs(folder, stage)
    record = TrainingRun.record

    def cut(self: TrainingRun, step: int, *words: object) -> None:
        if step == 2:
            raise Cut
        record(self, step, *words)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "record", cut)
        with pytest.raises(Cut):
            call(folder, stage)
    (state,) = folder.glob(".scratch/*/code-*/checkpoint-00000002/state.json")
    parts = json.loads(state.read_text())["parts"]
    assert parts["budget"] == {"asked_for": 8192, "size": SIZE_OF_ROLLOUTS if stage in WITH_ROLLOUTS else SIZE}
    failures = hungry.failures
    capsys.readouterr()
    call(folder, stage)
    # A start measures the base model before it resumes, at the size that runtime.yaml asks for.
    again = hungry.failures - failures
    assert again == (4 if stage == "train_sft@sft" else 0)
    assert outs(folder, stage) == outs(undisturbed, stage)


def test_a_row_that_does_not_fit_alone_is_one_line(
    copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = copy_of_tiny()
    change(folder / "runtime.yaml", {"default": {"on_out_of_memory": "retry"}})
    Hungry(monkeypatch, fits=10)
    message = refusal(folder, "train_rm", capsys)
    assert "on a single row, which runtime.yaml: micro_batch_tokens cannot cut" in message


def test_memory_that_runs_out_elsewhere_is_one_line_too(
    copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """While weights are loaded, or in a stage that reads no runtime.yaml."""
    folder = copy_of_tiny()

    def full(*_: object, **__: object) -> None:
        torch.empty(2**50, dtype=torch.uint8)

    for stage, place in (
        ("train_sft", "transformers.AutoModelForCausalLM.from_pretrained"),
        ("tokenize_data@sft", "stages.tokenize_data.write_tables"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            message = refusal(folder, stage, capsys)
        assert message.startswith("error: out of memory (")
        assert ("micro_batch_tokens" in message) == (stage == "train_sft")


def test_several_processes_cannot_retry(copy_of_tiny: Copy) -> None:
    folder = copy_of_tiny()
    change(folder / "runtime.yaml", {"default": {"on_out_of_memory": "retry"}})
    with inside(folder), pytest.raises(StageError, match="on_out_of_memory: retry needs one process, and there are 2"):
        StageRun("train_sft", {}, [], {}, read_runtime("train_sft"), Processes(0, 2, torch.device("cpu")))
