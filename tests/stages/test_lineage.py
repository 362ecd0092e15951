"""The lineage of a model: the chain that DVC recorded, and what of it the workspace still has."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.lib.command.hashing import dvc_hash
from stages.lib.operations.code_closure import MANIFESTS, code_hash
from stages.tools.lineage import is_manifest, origin_of
from stages.tools.show_lineage import main
from tests.loaded_python import loaded_python
from tests.stages.tiny_pipeline import PROJECT, change, inside, read_yaml, script

pytestmark = pytest.mark.slow
BEHIND_PPO = ["train_ppo@ppo", "tokenize_data@prompts", "train_rm@rm", "train_sft@sft", "prepare_data"]
BEHIND_PPO += ["prepare_base@base", "tokenize_data@preference", "tokenize_data@sft", "read_source_task@film_reviews"]


@pytest.fixture(scope="module")
def recorded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny project with its own code and the lock that DVC writes of it. Read only."""
    folder = tmp_path_factory.mktemp("recorded") / "project"
    shutil.copytree(tiny, folder, symlinks=True, ignore=shutil.ignore_patterns("stages", "rewards", "train_*-*"))
    for code in ("stages", "rewards"):
        shutil.copytree(PROJECT / code, folder / code, ignore=shutil.ignore_patterns("__pycache__"))
    dvc(folder, "init", "--no-scm", "--quiet")
    dvc(folder, "config", "core.analytics", "false")
    dvc(folder, "commit", "--force", "--quiet")
    shutil.rmtree(folder / ".dvc/cache")
    return folder


def dvc(folder: Path, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def project(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "project"))


def lineage(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """(exit code, what is printed, errors) of the real command."""
    with inside(folder):
        done = subprocess.run(
            [*loaded_python(), "-m", "stages.tools.show_lineage", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
    return done.returncode, done.stdout, done.stderr


def of(folder: Path, *paths: str) -> tuple[int, dict[str, Any]]:
    """(exit code, record), from the script's `main` in this process."""
    code, printed = 0, io.StringIO()
    with inside(folder), contextlib.redirect_stdout(printed):
        try:
            main([Path(path) for path in paths], as_json=True)
        except SystemExit as end:
            code = end.code
    return code, json.loads(printed.getvalue())


def change_lock(project: Path, edit: Callable[[dict], Any]) -> None:
    lock = read_yaml(project / "dvc.lock")
    edit(lock["stages"])
    with (project / "dvc.lock").open("w") as file:
        YAML(typ="safe", pure=True).dump(lock, file)


def test_the_chain_goes_back_to_the_data_with_every_hash_of_the_lock(recorded: Path) -> None:
    code, record = of(recorded, "models/ppo")
    assert code == 0
    assert sorted(record["stages"]) == sorted(BEHIND_PPO)
    assert {part: record[part] for part in ("asked", "altered", "missing", "older")} == {
        "asked": ["models/ppo"],
        "altered": [],
        "missing": [],
        "older": [],
    }
    locked = YAML(typ="safe", pure=True).load((recorded / "dvc.lock").read_text())["stages"]
    for name, stage in record["stages"].items():
        assert stage["params"] == locked[name].get("params", {}).get("params.yaml", {})
        for part, entries in (
            ("deps", [entry for entry in stage["inputs"] if "within" not in entry]),
            ("outs", stage["outs"]),
        ):
            hashes = {entry["path"]: entry["md5"] for entry in entries}
            recorded_paths = {entry["path"]: entry["md5"] for entry in locked[name][part]}
            assert hashes == {path: md5 for path, md5 in recorded_paths.items() if not is_manifest(path)}
            assert all(dvc_hash(recorded / path) == md5 for path, md5 in hashes.items())
        runs = [json.loads(line) for line in (recorded / ".scratch/runs.jsonl").read_text().splitlines()]
        logged = f"{script(name)}{''.join(name.partition('@')[1:])}"  # several groups of stages may run one script
        assert stage["run"] == next(run for run in runs if run["stage"] == logged)
    makers = {entry["path"]: entry["made_by"] for entry in record["stages"]["prepare_base@base"]["inputs"]}
    assert makers == {"data/prepared/train/sft.jsonl": "prepare_data"}


def test_the_code_of_a_run_comes_from_the_log_of_runs_or_a_commit_or_is_not_recorded(project: Path) -> None:
    manifest, log = project / MANIFESTS / "train_rm.txt", project / ".scratch/runs.jsonl"
    recorded = manifest.read_text()
    manifest.write_text(recorded.replace("stages/train_rm.py", "stages/other.py"))
    records = [json.loads(line) for line in log.read_text().splitlines()]
    for record in records:
        record["code"] = recorded if record["stage"] == "train_rm@rm" else None
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    (project / "stages/lib/objectives/pairwise_loss.py").unlink()
    older = ["train_rm@rm ran when these were still there: stages/lib/objectives/pairwise_loss.py"]
    assert of(project, "models/rm")[1]["older"] == older
    log.unlink()
    code, record = of(project, "models/rm")
    assert code == 1
    assert record["stages"]["train_rm@rm"]["code"] is None
    assert "the code that train_rm@rm ran is not recorded here" in record["older"][0]
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    now = manifest.read_text()
    for text, words in (("", ["init", "-q"]), (recorded, ["add", str(MANIFESTS)]), ("", ["commit", "-qm", "a"])):
        manifest.write_text(text or manifest.read_text())
        subprocess.run([*git, *words], cwd=project, check=True)
    manifest.write_text(now)
    assert of(project, "models/rm")[1]["older"] == older


def test_the_tree_has_each_stage_once_in_full(recorded: Path) -> None:
    code, text, _ = lineage(recorded, "models/ppo", "models/dpo/")
    assert code == 0
    titles = re.findall(r"^[│├└─ ]*([a-z@_]+( \(see above\))?) → (.*)$", text, flags=re.MULTILINE)
    full = [name for name, again, _ in titles if not again]
    assert sorted(full) == sorted([*BEHIND_PPO, "ref_logprobs@sft", "train_dpo@dpo"])
    assert titles[0] == ("train_ppo@ppo", "", f"models/ppo {dvc_hash(recorded / 'models/ppo')[:8]}")
    of_sft = [again for name, again, _ in titles if name.startswith("train_sft")]
    assert of_sft == ["", *[" (see above)"] * 3]  # below rm, ppo, ref_logprobs and dpo
    for words in (
        "params      kernels portable; seed 17; trust_remote_code false; train_ppo.ppo: ",
        "iterations 3, ",
        "source      made by the task film_reviews",
        "threads 1, ",
    ):
        assert words in text
    assert f"train_ppo.py {code_hash(recorded / 'stages/train_ppo.py')[:8]}" in text
    assert re.search(r"run +20\d\d-.* s, \d+ MiB, 1 process on cpu\n.*launcher +python -m\n", text)
    assert "MISSING" not in text
    assert text.endswith("All that is here is as recorded.\n")
    assert max(map(len, text.splitlines())) <= 120


def test_all_models_are_shown_if_none_is_named(recorded: Path) -> None:
    code, record = of(recorded)
    assert code == 0
    assert sorted(record["asked"]) == [f"models/{name}" for name in ("base", "dpo", "grpo", "ppo", "rm", "sft")]


def append(text: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        with path.open("a") as file:
            file.write(text)

    return edit


def set_beta(path: Path) -> None:
    change(path, {"train_rm": {"rm": {"epochs": 2.0}}})


def declare_more(path: Path) -> None:
    path.write_text(path.read_text().replace("launch.sh train_rm", "launch.sh train_rm --seed 1"))


ALTERED = "altered"
OLDER = "older"


@pytest.mark.parametrize(
    ("file", "edit", "part", "said"),
    [
        ("models/sft/config.json", append("\n"), ALTERED, ["models/sft was altered since train_sft@sft ran"]),
        (
            "data/prepared/train/sft.jsonl",
            append("\n"),
            ALTERED,
            [
                "data/prepared/train was altered since prepare_data ran",
                "data/prepared/train/sft.jsonl was altered since prepare_data ran",
            ],
        ),
        (
            "stages/lib/objectives/pairwise_loss.py",
            append("more = 1\n"),
            OLDER,
            ["train_rm@rm ran before these changed: stages/lib/objectives/pairwise_loss.py"],
        ),
        (
            "stages/lib/objectives/pairwise_loss.py",
            Path.unlink,
            OLDER,
            ["train_rm@rm ran when these were still there: stages/lib/objectives/pairwise_loss.py"],
        ),
        ("params.yaml", set_beta, OLDER, ["train_rm@rm was made with train_rm.rm.epochs 1.0, and params.yaml has 2.0"]),
        ("dvc.yaml", declare_more, OLDER, ["the command of train_rm@rm in dvc.yaml is another one"]),
        ("stages/train_ppo.py", append("more = 1\n"), None, []),
        ("stages/lib/objectives/pairwise_loss.py", append("# a remark\n"), None, []),
        ("models/dpo/config.json", append("\n"), None, []),
        ("runtime.yaml", append("#\n"), None, []),
    ],
)
def test_what_is_not_as_recorded_is_said_with_exit_code_1(
    project: Path, file: str, edit, part: str, said: list
) -> None:
    edit(project / file)
    code, record = of(project, "models/rm")
    assert code == (1 if said else 0)
    found = {name: record[name] for name in (ALTERED, OLDER) if record[name]}
    assert {part: sorted(texts) for part, texts in found.items()} == ({part: sorted(said)} if said else {})


def test_what_is_not_here_is_said_and_is_no_fault(project: Path) -> None:
    shutil.rmtree(project / "data")
    shutil.rmtree(project / "models/sft")
    code, record = of(project, "models/rm")
    assert code == 0
    kinds, splits = ("sft", "preference"), ("train", "validation", "test")
    assert {"models/sft", "data/prepared/train"} <= set(record["missing"])
    assert {f"data/tokens/{split}/{kind}.arrow" for kind in kinds for split in splits} <= set(record["missing"])


@pytest.mark.parametrize("path", ["models/sft", "data/prepared/train/sft.jsonl"])
def test_a_stage_that_read_an_earlier_version_is_named(project: Path, path: str) -> None:
    """As after a later `dvc repro train_sft` alone: the record of the version that train_rm read is gone."""
    reader = "train_rm@rm" if path == "models/sft" else "prepare_base@base"

    def edit(stages: dict) -> None:
        (dep,) = (dep for dep in stages[reader]["deps"] if dep["path"] == path)
        dep["md5"] = "0" * 32

    change_lock(project, edit)
    code, record = of(project, "models/rm")
    assert code == 1
    maker = "train_sft@sft" if path == "models/sft" else "prepare_data"
    assert record["older"] == [f"{reader} was made from an earlier {path} than {maker} has made since"]
    assert record["altered"] == []


def test_a_model_whose_own_stage_never_ran_here_is_no_raw_input(project: Path) -> None:
    """As after a model was put in place of the one that a stage makes: nothing is known of where it came from."""
    change_lock(project, lambda stages: stages.pop("train_sft@sft"))
    code, text, _ = lineage(project, "models/rm")
    assert code == 1
    assert re.search(r"─ models/sft \w{8}, made by train_sft@sft, of which dvc.lock has no run\n", text)
    assert "  - models/sft: train_sft@sft makes it, but dvc.lock has no run of that stage\n" in text
    assert "as recorded." not in text
    append("\n")(project / "models/sft/config.json")
    assert of(project, "models/rm")[1]["altered"] == ["models/sft was altered since train_rm@rm read it"]


@pytest.mark.parametrize(
    ("edit", "key"),
    [
        (lambda stages: stages.update({"train_sft@sft": None}), "stages.train_sft@sft"),
        (lambda stages: stages["train_sft@sft"].pop("cmd"), "stages.train_sft@sft.cmd"),
        (lambda stages: stages["train_sft@sft"].update(outs="x"), "stages.train_sft@sft.outs"),
        (lambda stages: stages["train_sft@sft"]["deps"][1].pop("path"), "stages.train_sft@sft.deps.1.path"),
        (
            lambda stages: stages["train_sft@sft"].update(params={"params.yaml": [1]}),
            "stages.train_sft@sft.params.params.yaml",
        ),
    ],
)
def test_a_lock_that_is_not_as_dvc_writes_it_is_refused(project: Path, edit: Callable[[dict], Any], key: str) -> None:
    change_lock(project, edit)
    code, text, error = lineage(project, "models/rm")
    assert (code, text) == (2, "")
    assert error.startswith(f"error: dvc.lock: {key}: ")


def test_a_run_of_other_outs_is_not_taken_for_this_one(project: Path) -> None:
    log = project / ".scratch/runs.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    for record in records:
        if record["stage"] == "train_sft@sft":
            record["outs"]["models/sft"] = "0" * 32 + ".dir"
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    code, text, _ = lineage(project, "models/sft")
    assert code == 0
    assert text.count("run         not known: no record of that run here") == 1
    assert of(project, "models/sft")[1]["stages"]["train_sft@sft"]["run"] is None


def test_a_path_that_no_stage_makes_is_refused_with_the_outs_there_are(project: Path) -> None:
    code, text, error = lineage(project, "models/pppo")
    assert (code, text) == (2, "")
    assert error.startswith("error: models/pppo: no stage in dvc.lock makes it; did you mean 'models/ppo'?; ")
    assert "models/base, models/dpo, models/grpo, models/ppo" in error
    (project / "dvc.lock").unlink()
    code, _, error = lineage(project, "models/ppo")
    assert (code, error) == (2, "error: dvc.lock is missing: nothing has been made here yet; run `make repro`\n")


def test_where_data_and_models_came_from_is_told_by_the_entries_that_a_stage_records() -> None:
    at = "0" * 40
    hub = {"sources.hub.hh.dataset": "Anthropic/hh-rlhf", "sources.hub.hh.revision": at}
    hub |= {"sources.hub.hh.data_dir": "harmless-base", "sources.hub.hh.config": None}
    assert origin_of(hub) == f"Hub dataset Anthropic/hh-rlhf at revision {at}, data_dir harmless-base"
    assert origin_of({"seed": 1, "prepare_base.hub.base": {"model": "Qwen/Qwen2.5-0.5B", "revision": at}}) == (
        f"Hub model Qwen/Qwen2.5-0.5B at revision {at}"
    )
    assert origin_of({"prepare_base.files.base": {"path": "models/mine"}}) == "local: models/mine"
    assert origin_of({"sources.files.own.path": "data/raw/own.jsonl"}) == "local: data/raw/own.jsonl"
    assert origin_of({"prepare_base.scratch.base": {"layers": 3}}) == "new random weights"
    assert origin_of({"sources.tasks.film_reviews.task": "film_reviews"}) == "made by the task film_reviews"
    # prepare_data reads all sources, and brings nothing.
    assert origin_of({"sources": {"files": {"own": {"path": "data/raw/own.jsonl"}}}}) is None
    assert origin_of({"train_rm.rm": {"epochs": 1.0}, "seed": 1}) is None
