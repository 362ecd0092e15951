"""What a stopped stage leaves and what the next start makes of it: damage, a full disk, other settings, other inputs.

Kills at every moment are in tests/proofs; here a run is cut short at one place, in this process.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import file_hash
from stages.lib.runs.partial_results import PartialResults
from stages.lib.runs.stage_run import StageRun
from stages.lib.runs.training_run import TrainingRun
from tests.loaded_python import loaded_python
from tests.proofs.tiny_projects import outs_of, remove_outs
from tests.stages.tiny_pipeline import call, change, contents, start

Copy = Callable[..., Path]


class Cut(BaseException):
    """Stands for a kill."""


def cut_short(
    folder: Path,
    stage: str,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    kind: type = TrainingRun,
    method: str = "record",
) -> None:
    """Run a stage until it has called a method of its run `after` times."""
    whole, calls = getattr(kind, method), []

    def counted(self: StageRun, *arguments: object) -> object:
        if len(calls) == after:
            raise Cut
        calls.append(arguments)
        return whole(self, *arguments)

    remove_outs(folder, stage)
    with monkeypatch.context() as patch:
        patch.setattr(kind, method, counted)
        with pytest.raises(Cut):
            call(folder, stage)


def outs(folder: Path, stage: str) -> dict[str, bytes]:
    return {f"{out}/{name}": text for out in outs_of(stage) for name, text in contents(folder / out).items()}


@pytest.fixture
def folder(copy_of_tiny: Copy) -> Path:
    project = copy_of_tiny()
    change(project / "runtime.yaml", {"default": {"checkpoint_seconds": 0.0}})
    return project


def checkpoints(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.glob(".scratch/*/code-*/checkpoint-*/*") if path.is_file())
    return {str(path): path.read_bytes() for path in found}


def test_a_damaged_checkpoint_costs_its_steps_alone(
    folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    cut_short(folder, "train_rm", monkeypatch, after=4)
    (state,) = folder.glob(".scratch/train_rm@rm-*/*/checkpoint-00000004/state.json")
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    capsys.readouterr()
    call(folder, "train_rm")
    said = capsys.readouterr()
    assert "checkpoint-00000004 is damaged" in said.err
    assert "resuming from step 3" in said.out
    assert outs(folder, "train_rm") == outs(tiny, "train_rm")


@pytest.mark.parametrize("changed", ["setting", "input"])
def test_another_setting_or_input_starts_anew(
    folder: Path, copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, changed: str
) -> None:
    cut_short(folder, "train_rm", monkeypatch, after=4)
    fresh = copy_of_tiny("fresh")
    for project in (folder, fresh):
        if changed == "setting":
            change(project / "params.yaml", {"train_rm": {"rm": {"optimizer": {"learning_rate": 0.0033}}}})
        else:
            (project / "data/tokens/train/preference.arrow").write_bytes(
                (project / "data/tokens/validation/preference.arrow").read_bytes()
            )
    capsys.readouterr()
    call(folder, "train_rm")
    assert "resuming" not in capsys.readouterr().out
    call(fresh, "train_rm")
    assert outs(folder, "train_rm") == outs(fresh, "train_rm")


@contextlib.contextmanager
def disk_at(path: Path) -> Iterator[Callable[[int], None]]:
    """Makes a folder a disk of its own, of so many KiB as the function is told; needs the right to mount one."""
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", path], capture_output=True).returncode:
        pytest.skip("no right to mount a disk here; the test with a limit on file size holds")
    try:
        yield lambda kib: subprocess.run(["mount", "-o", f"remount,size={kib}k", path], check=True) and None
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Callable[[int], None]]:
    """Makes the scratch folder a disk of so many KiB of its own."""
    with disk_at(folder / ".scratch") as resize:
        yield resize


def test_a_full_disk_keeps_the_earlier_checkpoint(
    folder: Path, tiny: Path, small_disk: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(folder, "train_rm", monkeypatch, after=2)
    before = checkpoints(folder)
    used = sum(len(content) for content in before.values()) // 1024
    small_disk(used + used // 4 + 64)  # room for two and a quarter, and the next is the third
    with pytest.raises(StageError, match=r"checkpoint of step 3 cannot be written to .*train_rm@rm-.*No space left"):
        call(folder, "train_rm")
    assert checkpoints(folder) == before
    small_disk(64 * 1024)
    call(folder, "train_rm")
    assert outs(folder, "train_rm") == outs(tiny, "train_rm")


def test_a_disk_that_is_full_at_the_end_costs_no_step(
    folder: Path,
    tiny: Path,
    small_disk: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def fill_then_publish(self: StageRun, build: Callable) -> None:
        small_disk(4096)
        with contextlib.suppress(OSError), (folder / ".scratch/ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        publish(self, build)

    publish = StageRun._publish
    with monkeypatch.context() as patch:
        patch.setattr(StageRun, "_publish", fill_then_publish)
        with pytest.raises(StageError, match=r"^no space left .*; free some"):
            call(folder, "train_rm")
    (folder / ".scratch/ballast").unlink()
    capsys.readouterr()
    call(folder, "train_rm")
    assert "resuming from step 6" in capsys.readouterr().out
    assert outs(folder, "train_rm") == outs(tiny, "train_rm")


CHANGES: dict[str, Callable[[dict], object]] = {
    "parts": lambda parts: parts.update(another=parts.pop("engine")),
    "keys": lambda parts: parts["best"].pop("step"),
    "values": lambda parts: parts["engine"].update(steps_taken="2"),
    "lists": lambda parts: parts.update(engine=[]),
    "numbers": lambda parts: parts["best"].update(results=3),
}
SAYS = {
    "parts": r"is of code that saved other things \(another, engine\)",
    "keys": r"other things \(best\.step\)",
    "values": r"other things \(engine\.steps_taken\)",
    "lists": r"other things \(engine\)",
    "numbers": r"other things \(best\.results\)",
    "tensors": r"is of code that saved other tensors \(it lacks engine/",
    "shapes": r"holds classifier\.score\.weight in shape \(1,\), the model has \(1, 32\)",
}


@pytest.mark.parametrize("what", list(SAYS))
def test_a_checkpoint_of_code_that_saved_other_things_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    cut_short(folder, "train_rm", monkeypatch, after=2)
    checkpoint = sorted(folder.glob(".scratch/*/code-*/checkpoint-*"))[-1]
    file = checkpoint / ("tensors-00000.safetensors" if what in ("tensors", "shapes") else "state.json")
    if file.suffix == ".json":
        state = json.loads(file.read_text())
        CHANGES[what](state["parts"])
        file.write_text(json.dumps(state))
    else:
        tensors = load_file(file)
        if what == "tensors":
            tensors = {f"another {name}": tensor for name, tensor in tensors.items()}
        else:
            tensors["engine/classifier.score.weight"] = torch.zeros(1)
        save_file(tensors, file)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["sha256"][file.name] = file_hash(file)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StageError, match=SAYS[what]):
        call(folder, "train_rm")
    assert checkpoint.is_dir()


def test_a_full_disk_under_the_results_is_told_at_each_start(folder: Path, tiny: Path) -> None:
    with disk_at(folder / "results") as resize:
        resize(16)
        out, model = "results", "results/rm"
        for _ in range(2):  # the second has nothing left to do but to publish
            with pytest.raises(StageError, match=r"^no space left at .*results/\.rm\.partial/.*; free some"):
                call(folder, "train_rm", out=out)
            assert list((folder / "results").iterdir()) == []
        resize(64 * 1024)
        call(folder, "train_rm", out=out)
        assert contents(folder / model) == contents(tiny / "models/rm")


@pytest.mark.slow
def test_a_full_disk_under_the_base_model_is_one_line(folder: Path) -> None:
    with disk_at(folder / "results") as resize:
        resize(16)
        (folder / "moved.sh").write_text(f'exec {" ".join(loaded_python())} -m $(echo "$@" | sed s#models#results#)\n')
        process = start(folder, "prepare_base", launch="sh moved.sh")
        _, errors = process.communicate()
        assert process.returncode == 2, errors
        assert errors.startswith("error: no space left")
        assert len(errors.splitlines()) == 1
        assert list((folder / "results").iterdir()) == []


def test_a_checkpoint_above_a_quota_keeps_the_earlier_one(
    folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(folder, "train_rm", monkeypatch, after=2)
    before = checkpoints(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(map(len, before.values())) // 2, limits[1]))
    try:
        with pytest.raises(
            StageError, match=r"checkpoint of step 3 cannot be written to .*train_rm@rm-.*File too large"
        ):
            call(folder, "train_rm")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints(folder) == before
    call(folder, "train_rm")
    assert outs(folder, "train_rm") == outs(tiny, "train_rm")


@pytest.mark.slow
def test_a_full_disk_ends_tokenize_with_one_line(folder: Path) -> None:
    remove_outs(folder, "tokenize_data@preference")
    command = f"ulimit -f 4; exec {os.sys.executable} -m"
    (folder / "limited.sh").write_text(f'{command} "$@"\n')
    process = start(folder, "tokenize_data@preference", launch="sh limited.sh")
    _, errors = process.communicate()
    assert process.returncode == 2, errors
    assert errors.startswith("error: ")
    assert "File too large" in errors
    assert len(errors.splitlines()) == 1
    assert not [path for path in (folder / "data/tokens").rglob("*") if "preference" in path.name]


@pytest.mark.parametrize(("stage", "chunks"), [("ref_logprobs", 4), ("evaluate@ppo", 4)])
def test_what_was_computed_before_a_kill_is_not_computed_again(
    folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, stage: str, chunks: int
) -> None:
    cut_short(folder, stage, monkeypatch, after=chunks - 1, kind=PartialResults, method="keep")
    kept = sorted(folder.glob(".scratch/*/kept/*"))
    assert len(kept) == chunks - 1
    content = bytearray(kept[0].read_bytes())
    content[content.rindex(b".") + 1] ^= 1  # the first decimal of a value: another digit
    kept[0].write_bytes(content)
    computed = []
    record = PartialResults._record
    monkeypatch.setattr(PartialResults, "_record", lambda self, value: computed.append(value) or record(self, value))
    capsys.readouterr()
    call(folder, stage)
    said = capsys.readouterr()
    assert "resuming" in said.out
    assert f"{kept[0].name} is damaged" in said.err
    assert len(computed) == 2  # the damaged chunk and the last one
    assert outs(folder, stage) == outs(tiny, stage)


@pytest.mark.parametrize("stage", ["train_ppo", "train_grpo"])
def test_a_signal_while_sampling_saves_the_iterations_before(
    stage: str, copy_of_tiny: Copy, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from stages.lib.rl.samplers.own import OwnSampler

    folder = copy_of_tiny()  # checkpoints once a minute: none before the signal
    sample = OwnSampler.sample

    def signalled(sampler: OwnSampler, prompts: list, step: int, *options: int) -> object:
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return sample(sampler, prompts, step, *options)

    with monkeypatch.context() as patch:
        patch.setattr(OwnSampler, "sample", signalled)
        with pytest.raises(SystemExit) as ended:
            call(folder, stage)
    assert ended.value.code == 128 + signal.SIGTERM
    said = capsys.readouterr()
    assert said.err.endswith(f"{stage}@{stage.removeprefix('train_')}: stopped by SIGTERM; state saved at step 1\n")
    assert "  2/3  " not in said.out
    call(folder, stage)
    assert "resuming from step 1" in capsys.readouterr().out
    assert outs(folder, stage) == outs(tiny, stage)


def catches(process: subprocess.Popen, number: int) -> bool:
    """True once a process has a handler for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tokenize_data@sft", "train_ppo"])
def test_a_stage_that_still_loads_libraries_ends_with_one_line(folder: Path, stage: str) -> None:
    process = start(folder, stage, launch=f"{sys.executable} -m")
    deadline = time.monotonic() + 60
    while not catches(process, signal.SIGTERM):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    output, errors = process.communicate()
    assert time.monotonic() - asked < 10
    assert (process.returncode, output, errors) == (128 + signal.SIGTERM, "", "stopped by SIGTERM\n")
