"""What stands where an out belongs: replaced and never written through, or told in one line, with nothing lost."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.lib.runs.stage_run import StageRun
from tests.pipeline.graph import computing_stages
from tests.proofs.tiny_projects import outs_of
from tests.stages.tiny_pipeline import call, contents, refusal, stage_options

Copy = Callable[..., Path]
STAGES: tuple = ("prepare_data", "prepare_base", "tokenize_data@preference", *computing_stages(), "evaluate@ppo")
STAGES += (pytest.param("report", marks=pytest.mark.slow),)
COMPUTING = ("train_sft", "ref_logprobs", "train_ppo", "evaluate@ppo")


def outs(folder: Path, stage: str) -> dict[str, bytes]:
    return {f"{out}/{name}": text for out in outs_of(stage) for name, text in contents(folder / out).items()}


def elsewhere_for(stage: str) -> dict[str, str]:
    """An out of the stage put into a folder of its own."""
    return {"out": "results/a/out"} if "--out" in stage_options(stage) else {"metrics": "results/a/out"}


def usual(stage: str) -> tuple[str, Path]:
    """Where that out is otherwise, and where it is below what the option names."""
    options = stage_options(stage)
    (name,) = elsewhere_for(stage)
    below = options[options.index(f"--{name}") + 1]
    out = next(out for out in outs_of(stage) if Path(out).is_relative_to(below))
    return out, Path(out).relative_to(below)


@pytest.mark.parametrize("stage", STAGES[:-1])  # the report's figures take long
def test_a_link_gives_way_and_what_it_leads_to_stays(copy_of_tiny: Copy, tiny: Path, stage: str) -> None:
    """A link to a folder, to a file, or to nothing, whatever the out is."""
    folder = copy_of_tiny()
    elsewhere = folder.parent / "elsewhere"
    (elsewhere / "folder").mkdir(parents=True)
    (elsewhere / "folder/mine").write_text("mine")
    (elsewhere / "file").write_text("mine")
    for target in ("folder", "file", "nothing"):
        for path in (folder / out for out in outs_of(stage)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            path.symlink_to(elsewhere / target)
        shutil.rmtree(folder / ".scratch", ignore_errors=True)
        call(folder, stage)
        assert not any((folder / out).is_symlink() for out in outs_of(stage))
        assert outs(folder, stage) == outs(tiny, stage)
        assert sorted(contents(elsewhere)) == ["file", "folder/mine"]
        assert set(contents(elsewhere).values()) == {b"mine"}


@pytest.mark.parametrize("stage", STAGES[:-1])  # the report asks to move a folder away
def test_a_file_in_place_of_a_folder_out_and_a_folder_in_place_of_a_file_give_way(
    copy_of_tiny: Copy, tiny: Path, stage: str
) -> None:
    folder = copy_of_tiny()
    for path in (folder / out for out in outs_of(stage)):
        if path.is_dir():
            shutil.rmtree(path)
            path.write_text("a file")
        else:
            path.unlink()
            path.mkdir()
            (path / "old").write_text("old")
    call(folder, stage)
    assert outs(folder, stage) == outs(tiny, stage)


@pytest.mark.parametrize("what", ["file", "dangling link"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_parent_that_is_no_folder_is_one_line_before_anything_is_computed(
    copy_of_tiny: Copy, capsys: pytest.CaptureFixture, stage: str, what: str
) -> None:
    folder = copy_of_tiny()
    for curve in (folder / "metrics/curves").glob("*.csv"):  # of the report, whose figures take long
        rows = [line.split(",")[:2] for line in curve.read_text().splitlines()]
        curve.write_text("".join(",".join(row) + "\n" for row in rows))
    results = folder / "results"
    if what == "file":
        results.write_text("mine")
    else:
        results.symlink_to("nowhere")
    message = refusal(folder, stage, capsys, **elsewhere_for(stage))
    assert "results" in message
    assert not list(folder.glob(".scratch/*/code-*/checkpoint-*"))
    assert not list(folder.glob(".scratch/*/kept/*"))
    assert not (folder / "nowhere").exists()
    assert what != "file" or results.read_text() == "mine"


@pytest.mark.parametrize("stage", COMPUTING)
def test_a_result_that_cannot_be_published_is_kept_and_published_later(
    copy_of_tiny: Copy, tiny: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """The place is lost while the stage runs."""
    folder = copy_of_tiny()
    publish = StageRun.publish

    def lose_the_place(self: StageRun, *words: object) -> None:
        shutil.rmtree(folder / "results")
        (folder / "results").write_text("a file")
        publish(self, *words)

    with monkeypatch.context() as patch:
        patch.setattr(StageRun, "publish", lose_the_place)
        message = refusal(folder, stage, capsys, **elsewhere_for(stage))
    again = refusal(folder, stage, capsys, **elsewhere_for(stage))  # once more, and nothing is lost
    for said in (message, again):
        assert "results" in said
        kept = Path(said.split("The finished result is kept in ")[1].split(", and is put in place")[0])
        assert (folder / kept).is_dir()
    (folder / "results").unlink()
    capsys.readouterr()
    call(folder, stage, **elsewhere_for(stage))
    assert "already finished with these settings and inputs" in capsys.readouterr().out
    out, below = usual(stage)
    assert contents(folder / "results/a/out" / below) == contents(tiny / out)


@pytest.mark.parametrize("stage", COMPUTING)
def test_a_closed_folder_is_one_line_before_anything_is_computed(
    copy_of_tiny: Copy, capsys: pytest.CaptureFixture, stage: str
) -> None:
    folder = copy_of_tiny()
    parent = folder / "results/a"
    parent.mkdir(parents=True, mode=0o555)
    if os.access(parent, os.W_OK):
        pytest.skip("this user may write into folders that are closed to others, as root may")
    assert "closed or read-only" in refusal(folder, stage, capsys, **elsewhere_for(stage))


@pytest.mark.parametrize("stage", ["train_sft", "tokenize_data@sft", "evaluate@ppo", "prepare_base"])
def test_a_place_that_the_system_keeps_is_one_line(
    copy_of_tiny: Copy, capsys: pytest.CaptureFixture, stage: str
) -> None:
    """As a read-only file system: nobody can make a file in /proc, not even root."""
    folder = copy_of_tiny()
    (folder / "results").mkdir()
    (folder / "results/a").symlink_to("/proc/self/fdinfo")
    assert "results/a" in refusal(folder, stage, capsys, **elsewhere_for(stage))
