"""The first stage: the check of all settings, and the manifests of code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.lib.command.strict_yaml import load_yaml
from stages.lib.operations.code_closure import MANIFESTS, script_name
from stages.lib.settings.check import check_settings, outs_of_graph
from stages.lib.settings.sections import default_params
from stages.prepare_base import check_settings_again
from stages.tools.use_profile import settings_of
from tests.loaded_python import loaded_python
from tests.pipeline.graph import all_instances, outs_of
from tests.stages.tiny_pipeline import (
    PROJECT,
    change,
    contents,
    inside,
    new_project,
    read_yaml,
    stage_options,
    use_base,
    write_yaml,
)

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return new_project(folder)


def check(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "STAGEWISE_SCRATCH"} | variables
    return subprocess.run(
        [*loaded_python(environment), "-m", "stages.code_manifest", *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_nothing_is_said_if_all_is_well_and_torch_is_not_loaded(project: Path) -> None:
    done = check(project, *stage_options("code_manifest"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    groups = load_yaml(PROJECT / "dvc.yaml")["stages"].values()  # those without an entry, too
    scripts = {script_name(group.get("do", group)["cmd"]) for group in groups}
    assert {file.stem for file in (project / MANIFESTS).iterdir()} == scripts - {"code_manifest"}
    code = (
        "import sys, stages.code_manifest as c; c.check_settings(); c.manifests();"
        "sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=project, check=False).returncode == 0


def test_the_committed_settings_pass() -> None:
    assert check(PROJECT).returncode == 0


@pytest.mark.parametrize("profile", ["hh-local", "qwen2.5-0.5b-hh"])
def test_a_profile_passes_where_its_data_and_model_are(project: Path, tmp_path: Path, profile: str) -> None:
    own_model(project / "models/pretrained", max_position_embeddings=512)
    (project / "data/raw/hh-rlhf").mkdir(parents=True)
    write_yaml(project / "params.yaml", settings_of(PROJECT / f"profiles/{profile}.yaml"))
    done = check(project, HF_HUB_CACHE=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("profile", ["online-dpo", "rejection-sampling", "arithmetic"])
def test_a_profile_of_generated_rows_passes(project: Path, profile: str) -> None:
    write_yaml(project / "params.yaml", settings_of(PROJECT / f"profiles/{profile}.yaml"))
    with inside(project):
        assert check_settings() == []


def test_the_outs_of_the_graph_are_all_known() -> None:
    graph = load_yaml(PROJECT / "dvc.yaml")
    known = outs_of_graph(graph, default_params())
    for stage in all_instances(graph).values():
        for out in outs_of(stage):
            assert any(out == name or out.startswith(f"{name}/") for name in known), out


@pytest.mark.parametrize(
    ("file", "changed", "message"),
    [
        ("params.yaml", {"train_ppo": {"ppo": {"minibatch_size": 3}}}, "must be a multiple of minibatch_size (3)"),
        ("params.yaml", {"evaluate": {"max_new_tokens": 4000}}, "evaluate.max_new_tokens is 4128, but the new model"),
        ("params.yaml", {"seed": -1}, "params.yaml: seed must be at least 0"),
        (
            "params.yaml",
            {"train_rm": {"rm": {"model": "$(touch pwned)"}}},
            "train_rm.rm.model: $(touch pwned) is neither there nor made by a stage",
        ),
        (
            "params.yaml",
            {"prepare_base": {"scratch": {"base": {"chat_template": "a.jinja"}}}},
            "chat_template: stages/chat_templates has no file a.jinja; put it there, or name one of chat.jinja",
        ),
        ("runtime.yaml", {"default": {"threads": 0}}, "threads must be at least 1"),
        ("runtime.yaml", {"default": {"tracker_folder": ".git/x"}}, "tracker_folder must not lie in .git/"),
    ],
)
def test_a_fault_is_one_line_and_writes_nothing(project: Path, file: str, changed: dict, message: str) -> None:
    before = contents(project / MANIFESTS)
    change(project / file, changed)
    done = check(project, "--out", str(MANIFESTS))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert contents(project / MANIFESTS) == before


@pytest.mark.parametrize("file", ["params.yaml", "runtime.yaml", "dvc.yaml"])
@pytest.mark.parametrize("text", ["a: !!int x", "5: x", "a: [", "- a", ""])
def test_a_file_that_cannot_be_read_is_named(project: Path, file: str, text: str) -> None:
    (project / file).write_text(text)
    done = check(project)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {file}")
    assert len(done.stderr.splitlines()) == 1


def test_training_state_among_results_is_refused(project: Path) -> None:
    done = check(project, STAGEWISE_SCRATCH="models/scratch")
    assert done.stderr == (
        "error: environment variable STAGEWISE_SCRATCH must not lie in models/, which is no place for it: "
        "found 'models/scratch'\n"
    )


def own_model(folder: Path, **config: object) -> None:
    folder.mkdir(parents=True)
    text = json.dumps({"model_type": "llama", "vocab_size": 400, "max_position_embeddings": 200} | config)
    (folder / "config.json").write_text(text)


def test_a_model_folder_is_asked_before_anything_runs(project: Path) -> None:
    own_model(project / "models/own", max_position_embeddings=150)
    use_base(project, "files", path="models/own")
    assert "tokenize_data.max_length is 192, but models/own has 150 positions" in check(project).stderr
    own_model(project / "models/other", model_type="bloom")
    use_base(project, "files", path="models/other")
    assert (
        "attention: sdpa is not there for models of type bloom, as models/other is; set it to eager"
        in check(project).stderr
    )


def test_a_model_without_a_classifier_is_a_warning(project: Path) -> None:
    own_model(project / "models/own", model_type="cohere")
    use_base(project, "files", path="models/own")
    done = check(project)
    assert done.returncode == 0
    assert done.stderr.startswith("warning: models of type cohere, as models/own is, have no sequence classifier")
    assert len(done.stderr.splitlines()) == 1


def test_a_hub_model_is_asked_once_its_files_are_here(project: Path, tmp_path: Path) -> None:
    use_base(project, "hub", model="some/model", revision=REVISION)
    cache = tmp_path / "cache"
    assert check(project, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1").returncode == 0
    own_model(cache / f"models--some--model/snapshots/{REVISION}", max_position_embeddings=150)
    done = check(project, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "tokenize_data.max_length is 192, but Hub model some/model has 150 positions" in done.stderr


def test_prepare_base_has_the_settings_checked_once_a_hub_model_is_here(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(project / "params.yaml", {"evaluate": {"max_new_tokens": 4000}})
    with inside(project):
        check_settings_again()
        monkeypatch.setenv("DVC_STAGE", "prepare_base_hub@base")
        with pytest.raises(SystemExit) as ended:
            check_settings_again()
    assert ended.value.code == 2


def test_another_machine_runs_no_value_through_a_shell(project: Path) -> None:
    graph = read_yaml(project / "dvc.yaml")
    graph["stages"]["train_sft"]["do"]["cmd"] = "sh stages/launch.sh train_sft --tokens '$(touch pwned)' ; touch pwned"
    (project / "dvc.yaml").write_text(json.dumps(graph))
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=project, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "stages.tools.join_stage", "--stage", "train_sft"],
        cwd=project,
        env=os.environ | {"LAUNCH": "echo started"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "started stages.train_sft --tokens $(touch pwned) ; touch pwned"
    assert not (project / "pwned").exists()
