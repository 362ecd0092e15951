"""Folders for what is no result lie neither among results nor in what Git, DVC and the environment keep."""

import os
from pathlib import Path

import pytest

from stages.lib.command.errors import StageError
from stages.lib.operations.own_folders import require_folder_of_its_own, require_within_project
from stages.lib.operations.scratch_root import scratch_root


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    for name in ("data/raw", "models/sft", ".git", "runs", "elsewhere"):
        (folder / name).mkdir(parents=True)
    (folder / "Makefile").touch()
    links = {"to_models": "models/sft", "to_itself": "to_itself", "to_runs": "runs", "away": "..", "to_top": "."}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (folder / ".venv").symlink_to("elsewhere")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return folder


@pytest.mark.parametrize(
    "path", ["runs", "runs/deeper", "new/folder", "to_runs", "to_runs/x", "away/x", "runs/../other", ".data"]
)
def test_a_folder_of_its_own_is_taken(project: Path, path: str) -> None:
    require_folder_of_its_own(Path(path), "key")
    require_folder_of_its_own(project / path, "key")
    require_within_project(Path(path), "key")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".", "must be a folder of its own, and '.' is the project"),
        ("runs/..", "must be a folder of its own"),
        ("to_top", "must be a folder of its own"),
        ("data", "must not lie in data/"),
        ("runs/../models/sft/x", "must not lie in models/"),
        ("to_models", "must not lie in models/"),
        ("to_models/deeper", "must not lie in models/"),
        (".git/x", "must not lie in .git/"),
        (".dvc", "must not lie in .dvc/"),
        ("elsewhere", "must not lie in .venv/"),
        ("x" * 300, "holds a name of more than 255 bytes"),
    ],
)
@pytest.mark.usefixtures("project")
def test_a_folder_that_is_taken_is_refused(path: str, message: str) -> None:
    with pytest.raises(StageError, match=r"^key ") as caught:
        require_folder_of_its_own(Path(path), "key")
    assert message in str(caught.value)


@pytest.mark.usefixtures("project")
def test_a_file_or_a_link_to_nothing_is_refused() -> None:
    for path in ("Makefile", "to_itself"):
        with pytest.raises(StageError, match=f"key must be a folder, and '{path}' is not one"):
            require_within_project(Path(path), "key")


@pytest.mark.parametrize("path", ["/etc", "..", "../x", "runs/../../x"])
@pytest.mark.usefixtures("project")
def test_what_leads_out_of_the_project_is_refused(path: str) -> None:
    with pytest.raises(StageError, match=r"must lie in the project, .*make a link in the project"):
        require_within_project(Path(path), "key")


@pytest.mark.parametrize("path", ["models", "data/raw/x", ".git", "to_models", "stages/x", "."])
def test_training_state_lies_beside_results_and_not_among_them(
    project: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAGEWISE_SCRATCH", path)
    with pytest.raises(StageError, match="environment variable STAGEWISE_SCRATCH"):
        scratch_root()
    monkeypatch.setenv("STAGEWISE_SCRATCH", str(project / path))
    with pytest.raises(StageError, match="environment variable STAGEWISE_SCRATCH"):
        scratch_root()


def test_a_copy_in_which_dvc_runs_an_experiment_counts_as_the_project(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(project))
    require_within_project(Path("runs"), "key")
    require_folder_of_its_own(Path(os.path.relpath(project / "runs")), "key")
    for path in (Path("to_models"), project / "models/x", copy / "models"):
        with pytest.raises(StageError, match="must not lie in models/"):
            require_folder_of_its_own(path, "key")
