"""The Makefile, with stand-ins for the programs it starts that write down how they were called."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.pipeline.graph import ROOT, all_instances, computing_stages, load_graph

STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, sys
name = pathlib.Path(sys.argv[0]).name
record = {{"argv": [name, *sys.argv[1:]], "launch": os.environ.get("LAUNCH"), "path": os.environ["PATH"]}}
record["hash seed"] = os.environ.get("PYTHONHASHSEED")
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(record) + "\\n")
if "importlib.metadata" in sys.argv[-1]:
    sys.exit("NVIDIA" not in os.environ)
if sys.argv[1:] == ["-m", "pip", "--version"]:
    print(f"pip 1 from somewhere (python {{os.environ.get('PIP_PYTHON', '3.11')}})")
if "--dot" in sys.argv:
    print('strict digraph {{\\n"b";\\n"a" -> "b";\\n"b" -> "c";\\n"a" -> "c";\\n"c" -> "aa";\\n}}')
if "stages.tools.targets" in sys.argv:
    print(" ".join(sys.argv[3:]))
sys.exit(name == os.environ.get("FAILS"))
"""
MEND = "python -m stages.tools.mend_lock"
CHECK = "python -m stages.code_manifest"
TARGETS = "python -m stages.tools.targets"
PRUNE = "python -m stages.tools.prune_scratch"
LOCKS = ("requirements.lock", "requirements-torch.lock", "requirements-cuda.lock")
LOCK = """a==1 \\
    --hash=sha256:a
setuptools==84 \\
    --hash=sha256:b \\
    --hash=sha256:c
z==2 \\
    --hash=sha256:d
"""
INSTALL = "python -m pip install --quiet --disable-pip-version-check --no-deps"
PLOT = "python -m stages.tools.plot_curves"
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
    "MODEL",
    "LABEL",
    "PORT",
]
STEPS = {
    "tokenize": "tokenize_data",
    **{name.replace("_", "-"): name for name in (key.partition("@")[0] for key in computing_stages())},
    "sample-pairs": "sample_pairs",  # without an entry in the default run
    "pass-rates": "pass_rates",  # likewise
    "ref-logprobs": "ref_logprobs ref_logprobs_unpaired",
    "train-unpaired": "train_unpaired",  # likewise
    "evaluate": "evaluate score_samples evaluate_rm",
    "report": "report",
}


@pytest.fixture
def project(tmp_path):
    """A folder with the Makefile and a finished .venv of stand-ins."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("python", "dvc", "ruff", "pyrefly"):
        write_stand_in(tmp_path / ".venv/bin" / name)
    (tmp_path / "requirements.lock").write_text(LOCK)
    for name in (*LOCKS, ".venv/.complete"):
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
    assert {*stage.split()} <= load_graph()["stages"].keys()
    assert make(project, target).returncode == 0
    assert commands(project) == [MEND, f"{TARGETS} {stage}", f"dvc repro {stage}", PRUNE]


@pytest.mark.parametrize(
    ("target", "stage"), [(name, f"evaluate@{name} score_samples@{name}") for name in ("dpo", "ppo", "grpo")]
)
def test_a_branch_goes_up_to_its_evaluation(project, target, stage):
    assert {*stage.split()} <= all_instances(load_graph()).keys()
    assert make(project, target).returncode == 0
    assert commands(project) == [MEND, f"{TARGETS} {stage}", f"dvc repro {stage}", PRUNE]


def test_repro_runs_everything(project):
    assert make(project, "repro").returncode == 0
    assert commands(project) == [MEND, "dvc repro", PRUNE]


# DVC takes stages that do not depend on each other out of a set.
@pytest.mark.parametrize("arguments", [["repro"], ["train-rm"], ["train-rm", "GPUS=2"], ["dpo"]])
def test_the_order_of_stages_is_always_the_same(project, arguments):
    assert make(project, *arguments, PYTHONHASHSEED="5").returncode == 0
    (repro,) = [call for call in calls(project) if call["argv"][:2] == ["dvc", "repro"]]
    assert repro["hash seed"] == "0"


def test_only_runs_one_step_alone(project):
    assert make(project, "train-rm", "ONLY=1").returncode == 0
    assert commands(project) == [
        MEND,
        "dvc repro code_manifest",
        f"{TARGETS} train_rm",
        "dvc repro --single-item train_rm",
        PRUNE,
    ]


@pytest.mark.parametrize("target", ["repro", "ppo", "grpo", "dpo"])
def test_only_is_refused_for_more_than_one_step(project, target):
    done = make(project, target, "ONLY=1")
    assert done.returncode == 2
    assert "name the step" in done.stderr
    assert not commands(project)


def test_gpus_sets_the_launcher(project):
    make(project, "train-ppo", "GPUS=4")
    assert calls(project)[2]["launch"] == "torchrun --standalone --nproc_per_node=4 -m"


def test_without_gpus_the_launcher_is_the_users_own(project):
    make(project, "train-ppo")
    assert calls(project)[2]["launch"] is None
    make(project, "train-ppo", LAUNCH="deepspeed")
    assert calls(project)[6]["launch"] == "deepspeed"


def test_the_environment_comes_first_in_the_path(project):
    make(project, "status")
    assert calls(project)[0]["path"].split(":")[0] == str(project / ".venv/bin")


def test_a_failed_step_fails_the_target_and_prunes_nothing(project):
    assert make(project, "train-rm", FAILS="dvc").returncode == 2
    assert commands(project) == [MEND, f"{TARGETS} train_rm", "dvc repro train_rm"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["metrics"], ["dvc metrics show"]),
        (["metrics-diff", "REV=HEAD~1"], ["dvc metrics diff HEAD~1"]),
        (["metrics-diff", "REV=main exp-a"], ["dvc metrics diff main exp-a"]),
        (["plots", "REV=v1"], [f"{PLOT} --rev v1 --rev workspace --out plots/curves.html"]),
        (
            ["plots", "REV=main exp-a it's $(touch;x)"],
            [f"{PLOT} --rev main --rev exp-a --rev it's --rev $(touch;x) --rev workspace --out plots/curves.html"],
        ),
        (["status"], [f"{CHECK} --compare", "dvc status"]),
        (["lineage"], ["python -m stages.tools.show_lineage"]),
        (["lineage", "OUT=models/ppo"], ["python -m stages.tools.show_lineage models/ppo"]),
        (["use", "PROFILE=small"], ["python -m stages.tools.use_profile --profile profiles/small.yaml"]),
        (
            ["use", "PROFILE=small", "FORCE=1"],
            ["python -m stages.tools.use_profile --profile profiles/small.yaml --drop-edits"],
        ),
        (["explain"], ["python -m stages.tools.explain"]),
        (["explain", "KEY=train_dpo.dpo.loss"], ["python -m stages.tools.explain train_dpo.dpo.loss"]),
        (["preview", "KIND=sft"], ["python -m stages.tools.preview_row --kind sft"]),
        (
            ["preview", "KIND=prompts", "ROW=3", "SPLIT=test"],
            ["python -m stages.tools.preview_row --kind prompts --row 3 --split test"],
        ),
        (
            ["preview", "KIND=preference", "TOKENS=data/sampled/first"],
            ["python -m stages.tools.preview_row --kind preference --tokens data/sampled/first"],
        ),
        (["samples", "OF=ppo"], ["python -m stages.tools.show_samples --of ppo"]),
        (
            ["samples", "OF=ppo", "SORT=-score", "WHERE=kl > 2", "COUNT=5"],
            ["python -m stages.tools.show_samples --of ppo --sort -score --where kl > 2 --count 5"],
        ),
        (["serve-rm"], ["python -m stages.tools.serve_reward --model models/rm"]),
        (
            ["serve-rm", "MODEL=models/a b", "PORT=1", "LABEL=POSITIVE"],
            ["python -m stages.tools.serve_reward --model models/a b --port 1 --label POSITIVE"],
        ),
        (["schemas"], ["python -m stages.tools.write_schemas"]),
        (["join", "STAGE=evaluate@ppo"], [CHECK, "python -m stages.tools.join_stage --stage evaluate@ppo"]),
        (["test"], ["python -m pytest -q -rs --numprocesses 2 --dist loadfile --no-loadscope-reorder"]),
        (["test-fast"], ["python -m pytest -q -m not slow"]),
        (
            ["lint"],
            [
                "ruff check benchmarks rewards stages tests",
                "ruff format --check benchmarks rewards stages tests",
                "pyrefly check --summary=none",
            ],
        ),
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
        ("preview", "make preview KIND=sft ROW=3"),
        ("samples", "make samples OF=grpo SORT=-score"),
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


HOSTILE = [
    "$(shell touch pwned)",
    "$$(touch pwned)",
    "`touch pwned`",
    "; touch pwned;",
    "' ; touch pwned; '",
    '"; touch pwned; "',
]
HOSTILE += ["x\ntouch pwned", "${IFS}&&touch pwned", "a b", "it's", 'say "x"', "a\\", "#", "$PATH", "*"]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("in_environment", [False, True])
@pytest.mark.parametrize(
    ("target", "variable", "before", "after"),
    [
        ("use", "PROFILE", ["-m", "stages.tools.use_profile", "--profile"], "profiles/{}.yaml"),
        ("lineage", "OUT", ["-m", "stages.tools.show_lineage"], "{}"),
        ("explain", "KEY", ["-m", "stages.tools.explain"], "{}"),
        ("preview", "KIND", ["-m", "stages.tools.preview_row", "--kind"], "{}"),
        ("samples", "OF", ["-m", "stages.tools.show_samples", "--of"], "{}"),
        ("serve-rm", "MODEL", ["-m", "stages.tools.serve_reward", "--model"], "{}"),
        ("join", "STAGE", ["-m", "stages.tools.join_stage", "--stage"], "{}"),
        ("soak", "MINUTES", ["-m", "tests.proofs.kill_matrix", "--minutes"], "{}"),
    ],
)
def test_what_a_user_gives_is_one_word_and_never_run(project, target, variable, before, after, text, in_environment):
    given = {variable: text} if in_environment else {}
    done = make(project, target, *([] if in_environment else [f"{variable}={text}"]), **given)
    assert done.returncode == 0, done.stderr
    assert calls(project)[-1]["argv"][1 : len(before) + 2] == [*before, after.format(text)]
    assert not (project / "pwned").exists()


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("target", ["metrics-diff", "plots", "train-rm"])
def test_no_variable_is_run_by_a_shell(project, target, text):
    make(project, target, f"REV={text}", f"GPUS={text}", f"ONLY={text}")
    make(project, target, f"REV={text}", f"ONLY={text}", f"FORCE={text}")
    (project / ".venv/.complete").unlink()
    make(project, target, f"REV={text}", f"PYTHON={text}")
    assert not (project / "pwned").exists()


@pytest.mark.parametrize("number", ["0", "-1", "two", "2 3", "1;", "01", "gpu auto", "$(shell echo 2)"])
def test_a_number_of_processes_that_is_none_is_refused(project, number):
    done = make(project, "train-rm", f"GPUS={number}")
    assert done.returncode == 2
    assert f"not '{number}'" in done.stderr
    assert not commands(project)


def test_a_finished_environment_costs_nothing(project):
    assert make(project, "setup").returncode == 0
    assert not commands(project)


@pytest.mark.parametrize("file", LOCKS)
@pytest.mark.parametrize("cuda", [False, True])
def test_a_changed_lock_is_installed_once_into_the_same_environment(project, file, cuda):
    os.utime(project / ".venv/.complete", (0, 0))
    for lock in LOCKS:
        os.utime(project / lock, (lock == file, lock == file))
    python = f"PYTHON={sys.executable}"
    version = ".".join(map(str, sys.version_info[:2]))
    done = make(project, "metrics", python, PIP_PYTHON=version, **({"NVIDIA": "1"} if cuda else {}))
    assert done.returncode == 0, done.stderr
    assert f"into .venv for Python {version}" in done.stdout
    asked = commands(project).pop(-3 if cuda else -2)
    assert asked.startswith("python -c ")
    assert [command for command in commands(project) if command != asked] == [
        "python -m pip --version",
        f"{INSTALL} --require-hashes --requirement .venv/setuptools.lock",
        f"{INSTALL} --require-hashes --no-build-isolation --requirement requirements.lock",
        f"{INSTALL} --requirement requirements-torch.lock",
        *([f"{INSTALL} --require-hashes --requirement requirements-cuda.lock"] if cuda else []),
        "dvc metrics show",
    ]
    assert (project / ".venv/setuptools.lock").read_text() == "".join(LOCK.splitlines(keepends=True)[2:5])
    count = len(commands(project))
    make(project, "metrics", python)
    assert commands(project)[count:] == ["dvc metrics show"]


def test_a_failed_installation_is_not_taken_for_finished(project):
    (project / ".venv/.complete").unlink()
    version = ".".join(map(str, sys.version_info[:2]))
    done = make(project, "metrics", f"PYTHON={sys.executable}", PIP_PYTHON=version, FAILS="python")
    assert done.returncode == 2
    assert not (project / ".venv/.complete").exists()
    assert "dvc metrics show" not in commands(project)


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
    kept += [".scratch/runs.jsonl", ".scratch/answers.sqlite"]
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
