"""A change makes stale exactly the stages that it can affect: DVC's answer, the source and what runs read agree."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.lib.operations.code_closure import LEFT_OUT, closure
from stages.lib.settings.sections import default_params
from tests.loaded_python import loaded_python
from tests.pipeline.graph import (
    FIRST,
    LAUNCHER,
    ROOT,
    code_of,
    declared_code,
    is_code,
    params_read,
    script_of,
    stage_names,
    training_stages,
)
from tests.pipeline.observed import access_times_are_kept
from tests.pipeline.staleness import (
    COMMENT,
    EDITED_KEYS,
    HEAD,
    IN_NO_DEPS,
    RAW_DATA,
    RAW_MODEL,
    REMARK,
    REWARD,
    SECTION,
    TABLE,
    instances_of_copy,
    stale_by_parts,
    table,
)

pytestmark = pytest.mark.slow
STAGES = stage_names()
# Code that a stage imports only on a way that it does not take with these settings, or never: the price of whole files.
SHARDED = {"stages/lib/compute/engine/deepspeed_setup.py": "several processes or ZeRO"}
DEEPSPEED = {"stages/lib/compute/engine/deepspeed.py": "several processes or ZeRO", **SHARDED}
TOKEN_TABLES = ("stages/lib/data/token_tables.py", "stages/lib/data/mapped_table.py")
IN_WORKERS = dict.fromkeys(
    ("stages/lib/rl/rewards/math_answer.py", "stages/lib/rl/rewards/response_form.py"), "processes of rewards"
)
PAID = ("train_ppo@", "train_grpo@", "evaluate@")  # stages with rewards
NOT_RUN = {
    "prepare_base@base": dict.fromkeys(
        (
            *("stages/lib/models/model_traits.py", "stages/lib/models/token_logprobs.py"),
            *("stages/lib/models/attention_masks.py", "stages/lib/models/logit_head.py"),
            *(*TOKEN_TABLES, "stages/lib/data/prompts.py"),
        ),
        "for a model that was trained elsewhere; here a new one is made",
    ),
    **{name: DEEPSPEED | (IN_WORKERS if name.startswith(PAID) else {}) for name in training_stages()},
    **{
        name: SHARDED | (IN_WORKERS if name.startswith(PAID) else {})
        for name in stage_names()
        if name.startswith(("ref_logprobs", "evaluate", "score_samples"))
    },
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Row of the table → stale stages, from DVC."""
    return stale_by_parts(tmp_path_factory.mktemp("staleness").resolve())


@pytest.fixture(scope="module")
def observed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each stage read in a run, from a process of its own that forks one for each stage."""
    folder = tmp_path_factory.mktemp("observed")
    if not access_times_are_kept(folder):
        pytest.skip("the file system keeps no times of access (noatime), by which reads of data are seen")
    done = subprocess.run(
        [*loaded_python(), "-m", "tests.pipeline.observed", tiny, folder], cwd=ROOT, capture_output=True, text=True
    )
    logs = "\n".join(path.read_text() for path in folder.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    return json.loads((folder / "observed.json").read_text())


def test_the_committed_table_is_what_dvc_says(answers) -> None:
    mend = "python -m tests.pipeline.staleness --write"
    assert TABLE.read_text(encoding="utf-8") == HEAD + table(answers), mend


def test_dvc_agrees_with_the_imports_and_the_keys_in_the_source(answers) -> None:
    files = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "stages").rglob("*") if "__pycache__" not in str(path)
    }
    files = {file for file in files if (ROOT / file).is_file()}
    of_code = {row for row in answers if row.startswith("stages/") and not row.endswith(REMARK)}
    assert of_code == files
    for name in instances_of_copy():
        code = files if name == FIRST else {file for file in declared_code(name) if not file.startswith(LEFT_OUT)}
        assert {row for row in of_code if name in answers[row]} == code, name


def test_dvc_agrees_with_the_sections_that_the_source_reads(answers) -> None:
    """Of groups that run one script together: one of them reads a part of the section, another one another."""
    assert {key.partition(".")[0] for key in EDITED_KEYS} == {*default_params()}
    of_script: dict[str, set[str]] = {}
    for name in instances_of_copy():
        rows = {row for row in EDITED_KEYS if name in answers[SECTION + row]}
        of_script.setdefault(script_of(name), set()).update(row.partition(".")[0] for row in rows)
        if name == FIRST:
            assert rows == {*EDITED_KEYS}
        else:
            assert of_script[script_of(name)] <= params_read(code_of(name)), name
    assert all(of_script[script_of(name)] == params_read(code_of(name)) for name in STAGES if name != FIRST)


@pytest.mark.parametrize(
    ("key", "stale"),
    [
        ("sources.files", {"read_source@own", "read_source@exam", "prepare_data"}),
        ("sources.hub", {"read_source_hub@far", "prepare_data"}),
        ("sources.tasks", {"read_source_task@film_reviews", "prepare_data"}),
        ("sources.files.own.weight", {"prepare_data"}),
        ("sources.hub.far.weight", {"prepare_data"}),
        ("sources.tasks.film_reviews.weight", {"prepare_data"}),
        ("prepare_data", {"prepare_data"}),
        ("prepare_base.scratch", {"prepare_base@base"}),
        ("prepare_base.files", {"prepare_base_files@given"}),
        ("prepare_base.hub", {"prepare_base_hub@far"}),
        ("fetch_model", {"fetch_model@judge"}),
        ("train_dpo", {"train_dpo@dpo", "report"}),
    ],
)
def test_a_key_makes_stale_who_reads_it_alone(answers, key: str, stale: set[str]) -> None:
    assert answers[SECTION + key] == {FIRST, *stale}


def test_how_stages_are_started_described_and_tested_makes_nothing_stale(answers) -> None:
    left_out = [row for row in answers if row.startswith(LEFT_OUT)]
    remarks = [row for row in answers if row.endswith(REMARK)]
    assert (len(left_out) > 10, len(remarks) > 100) == (True, True)
    assert [row for row in (*IN_NO_DEPS, COMMENT, LAUNCHER, *left_out, *remarks) if answers[row] - {FIRST}] == []
    assert [row for row in IN_NO_DEPS if answers[row]] == ["runtime.yaml"]
    assert all(answers[row] == {FIRST} for row in (COMMENT, *remarks))
    assert {row: answers[row] for row in (REWARD, *RAW_DATA.values(), RAW_MODEL)} == {
        REWARD: {FIRST, "train_grpo@grpo"},
        RAW_DATA["own"]: {"read_source@own"},
        RAW_DATA["exam"]: {"read_source@exam"},
        RAW_MODEL: {"prepare_base_files@given"},
    }


@pytest.mark.parametrize("name", STAGES)
def test_a_run_reads_the_code_that_is_declared(observed, name: str) -> None:
    seen = observed[name]
    # Python files are read to be hashed, too; those that run are modules.
    others = {file for file in seen["files"] if file.startswith("stages/") and Path(file).suffix not in (".py", ".pyc")}
    read = {*seen["modules"], *others}
    declared = {*seen["declared"]["code"], *seen["declared"]["deps"]}  # a template may be brought by a setting
    assert read <= declared
    if name != FIRST:
        left = set(seen["declared"]["code"]) - read
        assert left == set(NOT_RUN.get(name, ())), "list in NOT_RUN what is imported under other settings only"


@pytest.mark.parametrize("name", STAGES)
def test_a_run_looks_up_the_params_that_are_declared(observed, name: str) -> None:
    declared = {key.partition(".")[0] for key in observed[name]["declared"]["params"]}
    if name == FIRST:  # it depends on all of params.yaml
        assert declared == set()
    else:
        assert observed[name]["params"] == sorted(declared)


@pytest.mark.parametrize("name", STAGES)
def test_a_run_reads_the_data_and_models_that_are_declared_and_writes_its_outs_alone(observed, name: str) -> None:
    """Nothing else is read, though it lies there as in a project that has run; and each dep that is declared is."""
    seen = observed[name]
    others = ("stages", "rewards", "metrics/sample_pairs")  # in the last is nothing, as sample_pairs has no entry
    data = [dep for dep in seen["declared"]["deps"] if not is_code(dep) and dep not in others]
    unread = [dep for dep in data if not any(file == dep or file.startswith(f"{dep}/") for file in seen["data"])]
    assert unread == []
    assert seen["undeclared"] == []
    assert seen["left_behind"] == []
    within = [*seen["declared"]["deps"], *seen["declared"]["outs"], "params.yaml", "dvc.yaml", "runtime.yaml"]
    for file in seen["files"]:
        if not file.startswith(("stages/", "code_manifests")) and ".partial/" not in file:
            assert any(file == path or file.startswith(f"{path}/") for path in within), file


def test_what_is_read_undeclared_fails_the_run(tmp_path: Path) -> None:
    """The watch itself: a stage that opens a file, imports a module or looks up a key is seen to."""
    (tmp_path / "stages/lib").mkdir(parents=True)
    for package in ("stages", "stages/lib"):
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows").write_text("1\n")
    (tmp_path / "params.yaml").write_text("seed: 1\nother: 2\n")
    (tmp_path / "stages/lib/late.py").touch()
    for file in closure(["stages/lib/command/params.py"], ROOT):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text((ROOT / file).read_text())
    (tmp_path / "stages/report.py").write_text(
        "from stages.lib.command.params import read_value\n"
        "if __name__ == '__main__':\n"
        "    import stages.lib.late\n"
        "    read_value('seed', int)\n"
        "    open('data/rows').read()\n"
    )
    code = (
        "import json, pathlib, os\nfrom tests.pipeline.observed import run_watched\n"
        "folder = pathlib.Path(os.environ['FOLDER'])\nimport sys\n"
        "for name in [name for name in sys.modules if name.split('.')[0] == 'stages']: del sys.modules[name]\n"
        "os.chdir(folder)\nprint(json.dumps(run_watched(folder, 'report')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"FOLDER": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["params"] == ["seed"]
    assert {"stages/lib/late.py", "stages/lib/command/params.py", "stages/report.py"} <= set(seen["modules"])
    assert {"data/rows", "params.yaml"} <= set(seen["files"])
