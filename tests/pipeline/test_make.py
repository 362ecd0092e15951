"""The Makefile, with stand-ins for the programs it starts that write down how they were called."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.pipeline.closure import ROOT, load_graph
from tests.pipeline.test_graph import all_instances

STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, sys
name = pathlib.Path(sys.argv[0]).name
record = {{"argv": [name, *sys.argv[1:]], "launch": os.environ.get("LAUNCH"), "path": os.environ["PATH"]}}
record["hash seed"] = os.environ.get("PYTHONHASHSEED")
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(record) + "\\n")
if sys.argv[1:] == ["-m", "pip", "--version"]:
    print(f"pip 1 from somewhere (python {{os.environ.get('PIP_PYTHON', '3.11')}})")
if "--dot" in sys.argv:
    print('strict digraph {{\\n"b";\\n"a" -> "b";\\n"b" -> "c";\\n"a" -> "c";\\n"c" -> "aa";\\n}}')
sys.exit(name == os.environ.get("FAILS"))
"""
MEND = "python -m stages.mend_lock"
PRUNE = "python -m stages.prune_scratch"
VARIABLES = [
    "MAKEFLAGS",
    "MAKEOVERRIDES",
    "MAKELEVEL",
    "LAUNCH",
    "STAGEWISE_SCRATCH",
    "PYTHON",
    "ONLY",
    "GPUS",
    "REV",
    "PROFILE",
    "FORCE",
    "OUT",
    "STAGE",
]
STEPS = {
    "tokenize": "tokenize",
    "train-sft": "train_sft",
    "train-rm": "train_rm",
    "ref-logprobs": "ref_logprobs",
    "train-dpo": "train_dpo",
    "train-ppo": "train_ppo",
    "evaluate": "evaluate",
    "report": "report",
}


@pytest.fixture
def project(tmp_path):
    """A folder with the Makefile and a finished .venv of stand-ins."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("python", "dvc", "ruff"):
        write_stand_in(tmp_path / ".venv/bin" / name)
    for name in ("requirements.lock", "requirements-cuda.lock", ".venv/.complete"):
        (tmp_path / name).touch()
    return tmp_path


def write_stand_in(path):
    path.write_text(STAND_IN)
    path.chmod(0o755)


def make(project, *arguments, **variables):
    inherited = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=project,
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def calls(project):
    file = project / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def commands(project):
    return [" ".join(call["argv"]) for call in calls(project)]


def targets_in_makefile():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def test_help_is_the_default_and_lists_every_target_once(project):
    done = make(project)
    assert done.returncode == 0
    listed = [line.split()[0] for line in done.stdout.splitlines() if re.match(r"  [a-z-]+ +[A-Z]", line)]
    assert sorted(listed) == sorted(targets_in_makefile())
    assert not commands(project)
    phony = (ROOT / "Makefile").read_text().replace("\\\n", " ").split(".PHONY:")[1].split("\n")[0].split()
    assert sorted(phony) == sorted(targets_in_makefile())


@pytest.mark.parametrize(("target", "stage"), STEPS.items())
def test_a_step_brings_its_stage_up_to_date_then_prunes(project, target, stage):
    assert stage in load_graph()["stages"]
    assert make(project, target).returncode == 0
    assert commands(project) == [MEND, f"dvc repro {stage}", PRUNE]


@pytest.mark.parametrize(("target", "stage"), [("ppo", "evaluate@ppo"), ("dpo", "evaluate@dpo")])
def test_a_branch_goes_up_to_its_evaluation(project, target, stage):
    assert stage in all_instances(load_graph())
    assert make(project, target).returncode == 0
    assert commands(project) == [MEND, f"dvc repro {stage}", PRUNE]


def test_repro_runs_everything(project):
    assert make(project, "repro").returncode == 0
    assert commands(project) == [MEND, "dvc repro", PRUNE]


# DVC takes stages that do not depend on each other out of a set.
@pytest.mark.parametrize("arguments", [["repro"], ["train-rm"], ["train-rm", "GPUS=2"], ["dpo"]])
def test_the_order_of_stages_is_always_the_same(project, arguments):
    assert make(project, *arguments, PYTHONHASHSEED="5").returncode == 0
    assert calls(project)[1]["hash seed"] == "0"


def test_only_runs_one_step_alone(project):
    assert make(project, "train-rm", "ONLY=1").returncode == 0
    assert commands(project) == [MEND, "dvc repro --single-item train_rm", PRUNE]


@pytest.mark.parametrize("target", ["repro", "ppo", "dpo"])
def test_only_is_refused_for_more_than_one_step(project, target):
    done = make(project, target, "ONLY=1")
    assert done.returncode == 2
    assert "name the step" in done.stderr
    assert not commands(project)


def test_gpus_sets_the_launcher(project):
    make(project, "train-ppo", "GPUS=4")
    assert calls(project)[1]["launch"] == "torchrun --standalone --nproc_per_node=4 -m"


def test_without_gpus_the_launcher_is_the_users_own(project):
    make(project, "train-ppo")
    assert calls(project)[1]["launch"] is None
    make(project, "train-ppo", LAUNCH="deepspeed")
    assert calls(project)[4]["launch"] == "deepspeed"


def test_the_environment_comes_first_in_the_path(project):
    make(project, "status")
    assert calls(project)[0]["path"].split(":")[0] == str(project / ".venv/bin")


def test_a_failed_step_fails_the_target_and_prunes_nothing(project):
    assert make(project, "train-rm", FAILS="dvc").returncode == 2
    assert commands(project) == [MEND, "dvc repro train_rm"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["metrics"], ["dvc metrics show"]),
        (["metrics-diff", "REV=HEAD~1"], ["dvc metrics diff HEAD~1"]),
        (["plots", "REV=v1"], ["python -m stages.plot_curves --rev v1 --rev workspace --out plots/curves.html"]),
        (["status"], ["dvc status"]),
        (["lineage"], ["python -m stages.show_lineage"]),
        (["lineage", "OUT=models/ppo"], ["python -m stages.show_lineage models/ppo"]),
        (["use", "PROFILE=small"], ["python -m stages.use_profile --profile profiles/small.yaml"]),
        (
            ["use", "PROFILE=small", "FORCE=1"],
            ["python -m stages.use_profile --profile profiles/small.yaml --drop-edits"],
        ),
        (["join", "STAGE=evaluate@ppo"], ["python -m stages.join_stage --stage evaluate@ppo"]),
        (["test"], ["python -m pytest -q -rs --numprocesses 2 --dist loadfile --no-loadscope-reorder"]),
        (["test-fast"], ["python -m pytest -q -m not slow"]),
        (["lint"], ["ruff check benchmarks stages tests", "ruff format --check benchmarks stages tests"]),
    ],
)
def test_the_other_targets(project, arguments, expected):
    assert make(project, *arguments).returncode == 0
    assert commands(project) == expected


def test_dag_lists_every_stage_after_those_it_needs(project):
    done = make(project, "dag")
    assert commands(project) == ["dvc dag --dot --collapse-foreach-matrix"]
    assert [line.split() for line in done.stdout.splitlines()] == [["a"], ["b", "a"], ["c", "b", "a"], ["aa", "c"]]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("metrics-diff", "make metrics-diff REV="),
        ("plots", "make plots REV="),
        ("use", "make use PROFILE=default"),
        ("join", "make join STAGE=train_sft"),
    ],
)
def test_a_missing_variable_is_asked_for(project, target, message):
    done = make(project, target)
    assert done.returncode == 2
    assert message in done.stderr
    assert not commands(project)


def test_every_target_that_starts_a_program_makes_the_environment_first():
    without = {"help", "clean"}
    rules = re.findall(r"^([a-z-]+):(.*?)##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {target for target, needed in rules if "$(VENV)" not in needed} == without


def test_a_finished_environment_costs_nothing(project):
    assert make(project, "setup").returncode == 0
    assert not commands(project)


@pytest.mark.parametrize("file", ["requirements.lock", "requirements-cuda.lock"])
def test_a_changed_lock_is_installed_once_into_the_same_environment(project, file):
    stamp = project / ".venv/.complete"
    os.utime(stamp, (0, 0))
    os.utime(project / "requirements.lock", (0, 0))
    os.utime(project / "requirements-cuda.lock", (0, 0))
    os.utime(project / file, (1, 1))
    write_stand_in(project / "python3")
    python = f"PYTHON={sys.executable}"
    version = ".".join(map(str, sys.version_info[:2]))
    done = make(project, "status", python, PIP_PYTHON=version)
    assert done.returncode == 0, done.stderr
    assert f"into .venv for Python {version}" in done.stdout
    assert commands(project) == [
        "python -m pip --version",
        "python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock",
        "dvc status",
    ]
    make(project, "status", python)
    assert commands(project)[3:] == ["dvc status"]


def test_a_failed_installation_is_not_taken_for_finished(project):
    (project / ".venv/.complete").unlink()
    version = ".".join(map(str, sys.version_info[:2]))
    done = make(project, "status", f"PYTHON={sys.executable}", PIP_PYTHON=version, FAILS="python")
    assert done.returncode == 2
    assert not (project / ".venv/.complete").exists()
    assert "dvc status" not in commands(project)


@pytest.mark.parametrize(("version", "accepted"), [("3.10", False), ("3.11", True), ("3.13", True), ("3.14", False)])
def test_only_pythons_that_are_supported_are_used(project, version, accepted):
    """`other` is a Python that says it is `version`; made into an environment it does nothing more."""
    (project / ".venv/.complete").unlink()
    other = project / "other"
    other.write_text(f'#!/bin/sh\necho "$*" >> other.txt\n[ "$1" = -c ] && echo {version} || true\n')
    other.chmod(0o755)
    done = make(project, "setup", "PYTHON=./other", PIP_PYTHON="3.12")
    assert (done.returncode == 0) == accepted, done.stderr
    assert ("-m venv --clear .venv" in (project / "other.txt").read_text()) == accepted
    if not accepted:
        assert f"error: Python 3.11, 3.12 or 3.13 is needed, and './other' is {version};" in done.stderr
        assert not commands(project)


def test_a_missing_python_is_said_so(project):
    (project / ".venv/.complete").unlink()
    done = make(project, "setup", "PYTHON=python3.99")
    assert done.returncode == 2
    assert "'python3.99' is missing" in done.stderr


def test_clean_leaves_data_models_and_the_cache(project):
    kept = ["data/prepared/sft/train.jsonl", "models/sft/model.safetensors", "dvc.lock", ".dvc/cache/a"]
    kept += [".scratch/runs.jsonl"]
    removed = [".scratch/train_rm-1/state.pt", "plots/a.html", "models/.sft.partial/x", "stages/__pycache__/a.pyc"]
    for file in [*kept, *removed]:
        (project / file).parent.mkdir(parents=True, exist_ok=True)
        (project / file).touch()
    elsewhere = project / "elsewhere"
    elsewhere.mkdir()
    done = make(project, "clean", STAGEWISE_SCRATCH=str(elsewhere))
    assert done.returncode == 0
    assert f"kept: training state in {elsewhere}" in done.stdout
    assert elsewhere.is_dir()
    assert [file for file in kept if not (project / file).exists()] == []
    assert [file for file in removed if (project / file).exists()] == []
    assert (project / ".venv/.complete").exists()
