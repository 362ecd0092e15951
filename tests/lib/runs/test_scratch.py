"""Training state that outlives a kill: whole checkpoints only, the right ones only, logs cut to their length."""

import errno
import itertools
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import dvc_hash, file_hash
from stages.lib.operations.scratch_root import scratch_root
from stages.lib.runs import checkpoints
from stages.lib.runs import scratch as module
from stages.lib.runs.scratch import ScratchFolder, completed_record
from stages.tools import prune_scratch
from tests.proofs.forked_stage import in_child


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STAGEWISE_SCRATCH", str(tmp_path / "scratch"))
    return tmp_path


def new_scratch(settings: dict | None = None, inputs: tuple[Path, ...] = (), **options: bool | int) -> ScratchFolder:
    return ScratchFolder("train_rm", settings or {"learning_rate": 1}, inputs, **options)


def release(scratch: ScratchFolder) -> None:
    scratch._lock.close()


def test_a_checkpoint_comes_back_to_the_last_bit() -> None:
    scratch = new_scratch()
    numbers = [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, math.inf, -math.inf, 2**70]
    tensors = [("engine/a", torch.arange(4.0) / 3), ("engine/b", torch.tensor([1.0, math.nan], dtype=torch.bfloat16))]
    scratch.save(3, {"step": 3, "parts": {"numbers": numbers, "nan": math.nan, "none": None}}, tensors)
    loaded = scratch.load()
    assert loaded.state["step"] == 3
    assert list(map(repr, loaded.state["parts"]["numbers"])) == list(map(repr, numbers))
    assert math.isnan(loaded.state["parts"]["nan"])
    for name, tensor in tensors:
        assert loaded.read(name).dtype == tensor.dtype
        assert torch.equal(loaded.read(name).view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("value", [torch.zeros(1), np.int64(3), np.float64(0.5), (1, 2), {1: 2}, b"a", {3}])
def test_what_json_would_change_is_refused_before_it_is_written(value: object) -> None:
    scratch = new_scratch()
    with pytest.raises(TypeError, match="the state of a checkpoint"):
        scratch.save(3, {"step": 3, "parts": {"a": [value]}})


def test_a_checkpoint_holds_no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle, "Unpickler", None)
    monkeypatch.setattr(pickle, "loads", None)
    scratch = new_scratch()
    scratch.save(3, {"step": 3}, [("a", torch.zeros(2))])
    names = sorted(path.name for path in (scratch.state / "checkpoint-00000003").iterdir())
    assert names == ["manifest.json", "state.json", "tensors-00000.safetensors"]
    assert torch.equal(scratch.load().read("a"), torch.zeros(2))


def test_without_a_checkpoint_logs_start_anew() -> None:
    scratch = new_scratch()
    (scratch.logs / "curve.csv").write_text("step\n1\n")
    assert scratch.load() is None
    assert list(scratch.logs.iterdir()) == []


def test_logs_are_cut_to_what_they_were() -> None:
    scratch = new_scratch()
    log = scratch.logs / "curve.csv"
    log.write_text("step\n1\n2\n")
    scratch.save(2, {"step": 2})
    log.write_text("step\n1\n2\n3\n4")
    scratch.load()
    assert log.read_text() == "step\n1\n2\n"


def test_a_log_that_was_begun_after_the_checkpoint_goes() -> None:
    scratch = new_scratch()
    scratch.save(2, {"step": 2})
    (scratch.logs / "held_out.jsonl").write_text("{}\n")
    scratch.load()
    assert list(scratch.logs.iterdir()) == []


def test_a_damaged_checkpoint_gives_way_to_the_one_before(capsys: pytest.CaptureFixture) -> None:
    scratch = new_scratch()
    scratch.save(1, {"step": 1})
    scratch.save(2, {"step": 2})
    state = scratch.state / "checkpoint-00000002/state.json"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    assert scratch.load().state["step"] == 1
    assert "checkpoint-00000002 is damaged" in capsys.readouterr().err


def test_a_half_written_checkpoint_is_not_one() -> None:
    scratch = new_scratch()
    scratch.save(1, {"step": 1})
    (scratch.state / "checkpoint-00000002.partial").mkdir()
    (scratch.state / "checkpoint-00000003").mkdir()
    assert scratch.load().state["step"] == 1


DEEP = "[" * 100_000
OUTSIDE = {"../../../outside": "0" * 64}


def two_checkpoints() -> tuple[ScratchFolder, Path]:
    """A scratch folder with checkpoints of step 1 and 2, and the folder of the latter."""
    scratch = new_scratch()
    for step in (1, 2):
        scratch.save(step, {"step": step}, [("a", torch.full((2,), float(step)))])
    return scratch, scratch.state / "checkpoint-00000002"


def sign(checkpoint: Path) -> None:
    """Have the manifest hold the checksums of what is there."""
    hashes = {file.name: file_hash(file) for file in checkpoint.iterdir() if file.name != "manifest.json"}
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 2, "sha256": hashes}))


def comes_back_with_step_1(scratch: ScratchFolder, capsys: pytest.CaptureFixture) -> None:
    loaded = scratch.load()
    assert (loaded.state["step"], loaded.read("a").tolist()) == (1, [1.0, 1.0])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert "checkpoint-00000002 is damaged" in line


MANIFESTS = ["[]", "{}", "null", "3", "nan", '"a"', "", "{", DEEP, "9" * 5000, '{"sha256": null}', '{"sha256": {}}']
MANIFESTS += ['{"sha256": []}', '{"sha256": {"state.json": null}}', '{"sha256": {"state.json": 5}}', "\u00ff"]
MANIFESTS += [json.dumps({"sha256": OUTSIDE}), '{"sha256": {"/etc/passwd": "a"}}', '{"sha256": {"manifest.json": "a"}}']


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_damaged_manifest_gives_way_to_the_checkpoint_before(manifest: str, capsys: pytest.CaptureFixture) -> None:
    scratch, last = two_checkpoints()
    (last / "manifest.json").write_text(manifest)
    comes_back_with_step_1(scratch, capsys)


STATES = ["[]", "{}", "null", DEEP, '{"step": 2}', '{"step": "2", "log_lengths": {}}', '{"step": 3, "log_lengths": {}}']
STATES += ['{"step": 2, "log_lengths": []}', '{"step": 2, "log_lengths": {"a": -1}}']
STATES += ['{"step": 2, "log_lengths": {"a": "x"}}', '{"step": true, "log_lengths": {}}']
STATES += [f'{{"step": {"9" * 400}, "log_lengths": {{}}}}']


@pytest.mark.parametrize("state", STATES)
def test_a_state_of_another_form_gives_way_too_whatever_its_checksum(state: str, capsys: pytest.CaptureFixture) -> None:
    scratch, last = two_checkpoints()
    (last / "state.json").write_text(state)
    sign(last)
    comes_back_with_step_1(scratch, capsys)


def as_a_file(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("a file")


def as_a_link(checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.parents[3] / "elsewhere")
    checkpoint.symlink_to(checkpoint.parents[3] / "elsewhere")


def as_a_dangling_link(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.symlink_to("nowhere")


def with_one_tensor_file_more(checkpoint: Path) -> None:
    shutil.copy(checkpoint / "tensors-00000.safetensors", checkpoint / "tensors-00001.safetensors")


def with_a_linked_file(checkpoint: Path) -> None:
    file = checkpoint / "tensors-00000.safetensors"
    file.rename(checkpoint.parents[3] / "tensors")
    file.symlink_to(checkpoint.parents[3] / "tensors")


def with_a_pipe(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    os.mkfifo(checkpoint / "manifest.json")


def with_truncated_tensors(checkpoint: Path) -> None:
    file = checkpoint / "tensors-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def with_truncated_tensors_and_their_checksum(checkpoint: Path) -> None:
    with_truncated_tensors(checkpoint)
    sign(checkpoint)


DAMAGE = [as_a_file, as_a_link, as_a_dangling_link, with_one_tensor_file_more, with_a_linked_file, with_a_pipe]
DAMAGE += [with_truncated_tensors, with_truncated_tensors_and_their_checksum]


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_no_folder_of_its_manifest_gives_way(
    damage: Callable[[Path], None], capsys: pytest.CaptureFixture
) -> None:
    scratch, last = two_checkpoints()
    damage(last)
    comes_back_with_step_1(scratch, capsys)
    scratch.save(2, {"step": 2}, [("a", torch.full((2,), 2.0))])
    assert scratch.load().read("a").tolist() == [2.0, 2.0]
    assert last.is_dir()
    assert not last.is_symlink()


def test_no_log_outside_the_folder_is_cut(root: Path, capsys: pytest.CaptureFixture) -> None:
    scratch, last = two_checkpoints()
    outside = root / "outside"
    outside.write_text("whole")
    place = os.path.relpath(outside, scratch.logs)
    for length in (0, 2):
        (last / "state.json").write_text(json.dumps({"step": 2, "log_lengths": {place: length}}))
        sign(last)
        assert scratch.load().state["step"] == 1
        assert "lacks lines that" in capsys.readouterr().err
    assert outside.read_text() == "whole"


def old_checkpoint(state: Path, step: int) -> None:
    """As earlier code wrote it."""
    folder = state / f"checkpoint-{step:08d}"
    folder.mkdir(parents=True)
    torch.save({"step": step, "log_lengths": {}}, folder / "state.pt")
    sign(folder)


@pytest.mark.parametrize("across", [False, True])
def test_checkpoints_with_a_pickle_are_passed_over_with_one_line(across: bool, capsys: pytest.CaptureFixture) -> None:
    scratch = new_scratch(across_code_change=across)
    for code, step in (("a", 3), ("b", 5)):
        old_checkpoint(scratch.folder / f"code-{code * 16}", step)
    assert scratch.load() is None
    said = capsys.readouterr()
    assert said.err == ""
    (line,) = said.out.splitlines()
    assert "checkpoint-00000005 holds a pickle" in line
    assert line.endswith("starts from the beginning")
    scratch.save(1, {"step": 1})
    assert scratch.load().state["step"] == 1


@pytest.mark.parametrize("name", ["logs", "kept"])
def test_a_link_in_place_of_a_folder_of_state_is_refused(root: Path, name: str) -> None:
    scratch = new_scratch()
    release(scratch)
    place = scratch.logs if name == "logs" else scratch.kept
    if place.is_dir():
        place.rmdir()
    (root / "mine").mkdir()
    (root / "mine/file").write_text("mine")
    place.symlink_to(root / "mine")
    with pytest.raises(StageError, match=rf"{name} is a link"):
        new_scratch()
    assert (root / "mine/file").read_text() == "mine"


@pytest.mark.parametrize("kind", ["folder", "dangling link"])
def test_a_lock_that_is_no_file_is_one_line(root: Path, kind: str) -> None:
    scratch = new_scratch()
    release(scratch)
    lock = scratch.folder / "lock"
    lock.unlink()
    if kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(root / "outside")
    with pytest.raises(StageError, match=r"training state cannot be kept in .*/lock"):
        new_scratch()
    assert not (root / "outside").exists()


@pytest.mark.parametrize(("kept", "steps"), [(1, [5]), (2, [4, 5]), (4, [2, 3, 4, 5])])
def test_old_checkpoints_go(kept: int, steps: list[int]) -> None:
    scratch = new_scratch(kept_checkpoints=kept)
    for step in range(1, 6):
        scratch.save(step, {"step": step})
    names = sorted(path.name for path in scratch.state.glob("checkpoint-*"))
    assert names == [f"checkpoint-{step:08d}" for step in steps]


def test_a_state_belongs_to_its_settings_and_inputs(root: Path) -> None:
    data = root / "data.txt"
    data.write_text("a")
    folders = [new_scratch({"lr": 1}, (data,)).folder, new_scratch({"lr": 2}, (data,)).folder]
    data.write_text("b")
    folders.append(new_scratch({"lr": 1}, (data,)).folder)
    assert len(set(folders)) == 3


def of_code(monkeypatch: pytest.MonkeyPatch, code: str, **options: bool) -> ScratchFolder:
    monkeypatch.setattr(module, "running_hash", lambda: code * 64)
    return new_scratch(**options)


def save_with_log(scratch: ScratchFolder, *steps: int) -> None:
    """Checkpoints of these steps, each with a line of the log."""
    for step in steps:
        with (scratch.logs / "curve.csv").open("a") as log:
            log.write(f"{step}\n")
        scratch.save(step, {"step": step})


def test_other_code_resumes_only_if_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    old = of_code(monkeypatch, "a")
    save_with_log(old, 40, 50)
    release(old)
    new = of_code(monkeypatch, "b")
    assert new.load() is None
    assert "checkpoint-00000050 was made by other code and is not used (runtime.yaml: resume" in capsys.readouterr().out
    save_with_log(new, 3)  # stopped, to set the option
    release(new)
    asked = of_code(monkeypatch, "b", across_code_change=True)
    assert asked.load().state["step"] == 50
    assert (asked.logs / "curve.csv").read_text() == "40\n50\n"
    assert "made by other code; going on from it" in capsys.readouterr().out
    save_with_log(asked, 60)
    release(asked)
    assert of_code(monkeypatch, "b").load().state["step"] == 60


def test_code_that_comes_back_finds_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    for code, step in (("a", 50), ("b", 3)):
        scratch = of_code(monkeypatch, code)
        assert scratch.load() is None
        save_with_log(scratch, step)
        release(scratch)
    assert of_code(monkeypatch, "a").load().state["step"] == 50


def test_of_the_state_of_other_code_the_furthest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for code, step in (("a", 50), ("b", 3), ("c", 9)):
        scratch = of_code(monkeypatch, code)
        scratch.load()
        save_with_log(scratch, step)
        release(scratch)
    states = {path.name[5] for path in scratch.folder.glob("code-*")}
    assert states == {"a", "c"}


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = new_scratch()
    save_with_log(scratch, 1)

    def gone(path: Path) -> str:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(checkpoints, "file_hash", gone)
    with pytest.raises(StageError, match=r"checkpoint-00000001 cannot be read: .*state\.json: Stale file handle; "):
        scratch.load()
    assert (scratch.logs / "curve.csv").read_text() == "1\n"


def test_the_same_inputs_in_other_roles_are_another_run(root: Path) -> None:
    for name in ("dpo", "sft"):
        (root / name).write_text(name)
    policy_first = ScratchFolder("evaluate", {}, [root / "dpo", root / "sft"])
    sft_first = ScratchFolder("evaluate", {}, [root / "sft", root / "dpo"])
    assert policy_first.folder != sft_first.folder


def test_a_folder_that_cannot_be_written_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "file").write_text("")
    monkeypatch.setenv("STAGEWISE_SCRATCH", str(root / "file/scratch"))
    with pytest.raises(StageError, match=r"training state cannot be kept in .*file/scratch/train_sft"):
        ScratchFolder("train_sft", {}, [])


def test_a_second_process_is_refused() -> None:
    scratch = new_scratch()
    with pytest.raises(StageError, match="is in use: another process"):
        new_scratch()
    release(scratch)
    new_scratch()


def test_a_killed_process_leaves_no_lock() -> None:
    code = """
import os
from stages.lib.runs.scratch import ScratchFolder
held = ScratchFolder('a', {}, [])
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    ScratchFolder("a", {}, [])


def finish(scratch: ScratchFolder, root: Path, log: Callable[[dict[str, str]], None] = len) -> dict[str, Path]:
    folder = scratch.stage_outs()
    (folder / "model").mkdir()
    (folder / "model/weights").write_text("w")
    (folder / "metrics").write_text("{}")
    outs = {"model": root / "models/rm", "metrics": root / "metrics/rm.json"}
    scratch.complete(outs, log)
    return outs


def test_finished_outs_are_published_again(root: Path) -> None:
    scratch = new_scratch()
    outs = finish(scratch, root)
    assert scratch.publish_complete(outs)
    outs["model"].joinpath("weights").write_text("changed")
    assert scratch.publish_complete(outs)
    assert (root / "models/rm/weights").read_text() == "w"
    assert (root / "metrics/rm.json").read_text() == "{}"


def test_outs_appear_once_all_are_copied(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a kill would leave some of them, or half of one, where DVC and the user look for them."""
    scratch = new_scratch()
    outs = finish(scratch, root)
    there = []
    for name in ("copytree", "copyfile"):
        copy = getattr(module.shutil, name)

        def watched(*paths: Path, copy: Callable = copy, **options: bool) -> None:
            copy(*paths, **options)
            there.extend(path for path in outs.values() if path.exists())

        monkeypatch.setattr(module.shutil, name, watched)
    assert scratch.publish_complete(outs)
    assert there == []
    assert all(path.exists() for path in outs.values())


def test_unfinished_and_damaged_outs_are_not_published(root: Path, capsys: pytest.CaptureFixture) -> None:
    scratch = new_scratch()
    assert not scratch.publish_complete({})
    outs = finish(scratch, root)
    (scratch.folder / "outs/model/weights").write_text("x")
    assert not scratch.publish_complete(outs)
    assert "are damaged" in capsys.readouterr().err
    assert not (root / "models").exists()
    assert completed_record(scratch.folder) is None  # or prune_scratch would take what is trained now for finished
    outs = finish(scratch, root)
    (scratch.folder / "outs/metrics").unlink()
    assert not scratch.publish_complete(outs)


RECORDS = ["[]", "{}", "null", "3", "", DEEP, "9" * 5000, '{"code": "CODE"}', '{"code": "CODE", "outs": {}}']
RECORDS += ['{"code": "CODE", "outs": []}', '{"code": "CODE", "outs": {"model": {}}}']
RECORDS += ['{"code": 5, "outs": {"model": {}}}', '{"code": "CODE", "outs": {"model": {"path": "a", "dvc_hash": 3}}}']
RECORDS += ['{"code": "CODE", "outs": {"../..": {"path": "/etc", "dvc_hash": "x"}}}']


@pytest.mark.parametrize("record", RECORDS)
def test_a_damaged_record_of_the_end_publishes_and_prunes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, record: str
) -> None:
    monkeypatch.chdir(root)
    scratch = new_scratch()
    outs = finish(scratch, root)
    assert scratch.publish_complete(outs)
    locked(root, outs)
    shutil.rmtree(root / "models")
    (scratch.folder / "complete.json").write_text(record.replace("CODE", scratch.code))
    release(scratch)
    prune_scratch.main()
    assert scratch.folder.is_dir()
    assert not new_scratch().publish_complete(outs)
    (line,) = capsys.readouterr().err.splitlines()
    assert "are damaged; not using them" in line
    assert not (root / "models").exists()


def test_pruning_follows_no_link_and_touches_nothing_else(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    scratch = new_scratch()
    outs = finish(scratch, root)
    assert scratch.publish_complete(outs)
    locked(root, outs)
    release(scratch)
    elsewhere = root / "elsewhere"
    scratch.folder.rename(elsewhere)
    scratch.folder.symlink_to(elsewhere)
    (scratch_root() / "mine").mkdir()  # an empty folder, as are those of runs that never began
    (scratch_root() / "runs.jsonl").write_text("")
    prune_scratch.main()
    assert (elsewhere / "outs/model/weights").read_text() == "w"
    assert list((scratch_root() / "mine").iterdir()) == []
    shutil.copytree(elsewhere, scratch_root() / "train_rm-0123456789abcdef")
    prune_scratch.main()
    assert not (scratch_root() / "train_rm-0123456789abcdef").exists()


def test_starting_to_build_outs_unmarks_an_earlier_end(root: Path) -> None:
    scratch = new_scratch()
    finish(scratch, root)
    assert completed_record(scratch.folder) is not None
    scratch.stage_outs()
    assert completed_record(scratch.folder) is None


def test_a_disk_that_refuses_keeps_the_earlier_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = new_scratch()
    scratch.save(1, {"step": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_synced", full)
    with pytest.raises(StageError, match=r"checkpoint of step 2 cannot be written .*No space left"):
        scratch.save(2, {"step": 2})
    assert scratch.load().state["step"] == 1
    assert list(scratch.state.glob("*.partial")) == []


def test_checkpoints_of_a_run_that_was_not_resumed_give_way() -> None:
    scratch = new_scratch()
    save_with_log(scratch, 490, 500)
    (scratch.logs / "curve.csv").unlink()
    assert scratch.load() is None
    save_with_log(scratch, 50)
    assert scratch.load().state["step"] == 50
    assert [path.name for path in scratch.state.glob("checkpoint-*")] == ["checkpoint-00000050"]


def test_a_checkpoint_whose_log_is_too_short_is_not_used(capsys: pytest.CaptureFixture) -> None:
    scratch = new_scratch()
    log = scratch.logs / "curve.csv"
    for step in (1, 2):
        log.write_text("step\n" + "1\n" * step)
        scratch.save(step, {"step": step})
    log.write_text("step\n1\n")
    assert scratch.load().state["step"] == 1
    assert log.read_text() == "step\n1\n"
    assert "lacks lines that" in capsys.readouterr().err


def test_a_result_of_other_code_is_never_published_as_this_codes(root: Path) -> None:
    scratch = new_scratch()
    outs = finish(scratch, root)
    record = scratch.folder / "complete.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "code": "another"}))
    release(scratch)
    assert not new_scratch(across_code_change=True).publish_complete(outs)
    assert completed_record(scratch.folder) is None


def locked(root: Path, outs: dict[str, Path]) -> None:
    """Write a dvc.lock that holds `outs`."""
    lines = [f"    - path: {path}\n      md5: {dvc_hash(path)}\n" for path in outs.values()]
    (root / "dvc.lock").write_text("stages:\n  train_rm:\n    cmd: a\n    outs:\n" + "".join(lines))


def test_finished_state_goes_once_it_is_locked_and_not_in_use(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    scratch = new_scratch()
    outs = finish(scratch, root)
    assert scratch.publish_complete(outs)
    release(scratch)
    prune_scratch.main()
    assert scratch.folder.exists()  # not locked yet
    locked(root, outs)
    scratch = new_scratch()
    prune_scratch.main()
    assert scratch.folder.exists()  # in use
    release(scratch)
    prune_scratch.main()
    assert not scratch.folder.exists()


def test_a_prune_that_is_killed_ends_the_next_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setenv("STAGEWISE_SCRATCH", str(root / ".scratch"))  # where in_child has it
    for at in itertools.count(1):
        scratch = new_scratch()
        outs = finish(scratch, root)
        assert scratch.publish_complete(outs)
        scratch.save(1, {"step": 1})
        locked(root, outs)
        release(scratch)
        status = in_child(root, prune_scratch.main, at).status
        if status == 0:
            break
        if at % 2:  # a start in between takes no half for the whole
            outs["metrics"].unlink()
            scratch = new_scratch()
            assert scratch.publish_complete(outs) == outs["metrics"].exists()
            release(scratch)
            continue
        prune_scratch.main()
        assert list((root / ".scratch").iterdir()) == []
    assert at > 8


def test_a_run_is_logged_before_it_counts_as_finished(root: Path) -> None:
    scratch = new_scratch()
    logged = []

    def log(hashes: dict[str, str]) -> None:
        logged.append((hashes, completed_record(scratch.folder)))

    outs = finish(scratch, root, log)
    assert scratch.publish_complete(outs)
    assert logged == [({str(path): dvc_hash(path) for path in outs.values()}, None)]


def test_what_other_code_has_begun_in_the_same_folder_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    scratch = new_scratch()
    outs = finish(scratch, root)
    assert scratch.publish_complete(outs)
    locked(root, outs)
    scratch.code = "another"
    assert not scratch.publish_complete(outs)
    scratch.save(1, {"step": 1})  # and then it is killed
    release(scratch)
    prune_scratch.main()
    assert scratch.state.joinpath("checkpoint-00000001").is_dir()


def test_an_input_that_is_not_there_is_named(root: Path) -> None:
    with pytest.raises(StageError, match=r"an input cannot be read: .*typo.*No such file"):
        new_scratch(inputs=(root / "typo",))


def test_an_experiments_copy_uses_the_projects_own_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = root / ".dvc/tmp/exps/standalone/tmpabc"
    copy.mkdir(parents=True)
    assert scratch_root() == root / "scratch"
    monkeypatch.delenv("STAGEWISE_SCRATCH")
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.chdir(root)
    assert scratch_root() == Path(".scratch")
    monkeypatch.chdir(copy)
    assert scratch_root() == root / ".scratch"
    monkeypatch.setenv("STAGEWISE_SCRATCH", "state")
    assert scratch_root() == root / "state"
    monkeypatch.delenv("STAGEWISE_SCRATCH")
    monkeypatch.delenv("DVC_ROOT")
    assert scratch_root() == Path(".scratch")
