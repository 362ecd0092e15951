"""Raw data and a base model under DVC: `dvc add`, push, a clone, pull, a run there, and experiments in a copy."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from dvc.repo import Repo

from tests.proofs.dvc_projects import git, start_dvc
from tests.stages.data_stages import use_source
from tests.stages.tiny_pipeline import PROJECT, change

ADDED = {"data/raw/x.jsonl.dvc", "data/raw/more/y.csv.dvc", "models/pretrained.dvc"}
PAIRS = {"path": "data/raw/x.jsonl", "kinds": ["preference", "sft", "prompts"]}
OUT = "data/prepared/train/preference.jsonl"


def dvc(folder: Path, *words: str) -> str:
    output = folder / ".dvc/tmp/test.output"
    output.parent.mkdir(exist_ok=True)
    output.unlink(missing_ok=True)
    code = start_dvc(folder, *words, output=output).wait()
    assert code == 0, (words, output.read_text())
    return output.read_text()


def copy_of_files(folder: Path) -> Path:
    """The tracked and the new files of this project, without results, in a new Git and DVC repository."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=PROJECT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in listed:
        if name and (PROJECT / name).is_file() and name != "dvc.lock" and not name.startswith(("metrics/", "tests/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, folder / name)
    git(folder, "init", "-q")
    return folder


def write_raw(folder: Path) -> None:
    rows = [{"prompt": f"Question {row}?", "chosen": f"Yes, {row}.", "rejected": "No."} for row in range(40)]
    (folder / "data/raw/x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data/raw/more").mkdir()
    (folder / "data/raw/more/y.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    (folder / "models/pretrained").mkdir(parents=True)
    (folder / "models/pretrained/config.json").write_text("{}\n")
    (folder / "models/pretrained/model.safetensors").write_bytes(bytes(64))


def added_files(folder: Path) -> set[str]:
    """The .dvc files that DVC's own index of a project lists."""
    with Repo(str(folder)) as repo:
        paths = [Path(stage.path) for stage in repo.index.stages]
    return {path.relative_to(folder).as_posix() for path in paths if path.suffix == ".dvc"}


def use_cache(folder: Path, kind: str) -> None:
    dvc(folder, "config", "--local", "cache.type", kind)


@pytest.mark.slow
@pytest.mark.parametrize("cache_type", ["symlink", "hardlink"])
def test_raw_data_is_added_pushed_cloned_pulled_and_used(tmp_path: Path, cache_type: str) -> None:
    project = tmp_path / "project"
    copy_of_files(project)
    write_raw(project)
    use_source(project, PAIRS)
    use_cache(project, cache_type)
    dvc(project, "add", "data/raw/x.jsonl", "data/raw/more/y.csv", "models/pretrained")
    dvc(project, "remote", "add", "--default", "storage", str(tmp_path / "storage"))
    assert added_files(project) == ADDED
    dvc(project, "repro", "prepare_data")
    git(project, "add", "--all")
    tracked = set(git(project, "ls-files", "data", "models").split())
    assert {path for path in tracked if not path.endswith("/.gitkeep")} == ADDED
    git(project, "commit", "-q", "-m", "raw data")
    assert git(project, "status", "--porcelain") == ""
    dvc(project, "push")

    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(project), str(clone))
    use_cache(clone, cache_type)
    dvc(clone, "pull", *ADDED, "read_source@mine", "prepare_data")
    assert added_files(clone) == ADDED
    raw = clone / "data/raw/x.jsonl"
    assert raw.is_symlink() == (cache_type == "symlink")
    assert (raw.stat().st_nlink > 1) == (cache_type == "hardlink")
    for name in ("data/raw/x.jsonl", "data/raw/more/y.csv", "models/pretrained/model.safetensors", OUT):
        assert (clone / name).read_bytes() == (project / name).read_bytes()
    assert "up to date" in dvc(clone, "status", "prepare_data", *ADDED)
    first = (clone / OUT).read_bytes()
    change(clone / "params.yaml", {"seed": 5})
    assert "Running stage 'prepare_data'" in dvc(clone, "repro", "prepare_data")
    assert (clone / OUT).read_bytes() != first
    assert {line[3:] for line in git(clone, "status", "--porcelain").splitlines()} <= {
        *("params.yaml", "dvc.lock", "metrics/prepare_data.json"),
        *("metrics/read_source/mine.json", "metrics/read_source/mine.txt"),
    }


@pytest.mark.slow
def test_an_experiment_in_a_copy_finds_local_data(tmp_path: Path) -> None:
    project = copy_of_files(tmp_path / "project")
    write_raw(project)
    use_source(project, PAIRS)
    dvc(project, "add", "data/raw/x.jsonl")
    git(project, "add", "--all")
    git(project, "commit", "-q", "-m", "raw data")
    said = dvc(project, "exp", "run", "--temp", "--name", "other-seed", "--set-param", "seed=5", "prepare_data")
    assert "Running stage 'prepare_data'" in said
    assert "other-seed" in said
    counts = json.loads(
        git(project, "show", "refs/exps/" + exp_ref(project, "other-seed") + ":metrics/prepare_data.json")
    )
    assert sum(counts[f"preference/{split}_rows"] for split in ("train", "validation", "test")) == 40
    assert not os.path.lexists(project / OUT)


def exp_ref(project: Path, name: str) -> str:
    (ref,) = [line for line in git(project, "for-each-ref", "--format=%(refname)").split() if line.endswith(f"/{name}")]
    return ref.removeprefix("refs/exps/")
