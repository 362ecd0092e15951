"""dvc.yaml against the source: a stage depends on what can change its outs, and on nothing else.

Every check is a function of a graph (the mapping in dvc.yaml) and a folder that returns what is wrong, so that the
tests can break a small graph and see the check find it.
"""

import ast
import re
import subprocess
import sys
from copy import deepcopy
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.lib.operations.code_closure import MANIFESTS, lines_of, manifest_of, script_name
from stages.lib.settings.evaluate import Evaluate
from stages.lib.settings.score_samples import ScoreSamples
from stages.lib.settings.sections import default_params
from stages.lib.settings.sources import FileSource, HubSource
from stages.lib.settings.task_sources import ArithmeticSettings, FilmReviewSettings
from tests.pipeline.graph import (
    CHAT_TEMPLATE,
    FIRST,
    ROOT,
    all_instances,
    body_of,
    called_name,
    code_of,
    computing_stages,
    is_at_or_below,
    is_code,
    load_graph,
    manifest_path,
    outs_of,
    params_read,
    parsed,
    paths,
    script_of,
)

GRAPH = load_graph()
BODIES = {name: body_of(stage) for name, stage in GRAPH["stages"].items()}
STAGES = tuple(BODIES)
TEMPLATED = re.compile(r"\$\{(?!item\.|key\})[\w.]+\}")
OF_SECTION = re.compile(r"\$\{(?!item\b|key\})(\w+)")
IN_GIT = ("metrics/", str(MANIFESTS))
TOP_FOLDERS = ("data", "metrics", "models", str(MANIFESTS))
BEFORE_ALL = {"params.yaml", "rewards", "runtime.yaml", "stages"}  # deps of the first stage


def paths_in_cmd(stage: dict[str, Any]) -> list[str]:
    """Values of the command's options that are paths: with a slash, or templated from params, or a top-level folder."""
    values = re.findall(r"--[\w-]+ (\S+)", stage["cmd"])
    return [value for value in values if "/" in value or TEMPLATED.fullmatch(value) or value in TOP_FOLDERS]


def wrong_params(name: str, stage: dict[str, Any], root: Path = ROOT) -> set[str]:
    return sections_of(stage) ^ params_read(code_of(name, root), root)


def sections_of(stage: dict[str, Any]) -> set[str]:
    """The top-level keys of params.yaml that a stage declares, or keys below them."""
    return {entry.split(".")[0] for entry in stage.get("params") or ()}


def undeclared_paths(stage: dict[str, Any]) -> list[str]:
    """Paths of the command that are no dep and no out, and no folder above one."""
    declared = [*paths(stage["deps"]), *outs_of(stage)]
    return [path for path in paths_in_cmd(stage) if not any(is_at_or_below(known, path) for known in declared)]


def paths_not_in_cmd(stage: dict[str, Any]) -> list[str]:
    """Data, models and outs that are declared and that the command neither names nor names a folder of.

    A dep that a setting names is not among them: its script reads it in params.yaml.
    """
    deps = [dep for dep in paths(stage["deps"]) if not is_code(dep) and not dep.startswith("${")]
    declared = [dep for dep in deps if dep not in BEFORE_ALL] + outs_of(stage)
    return [path for path in declared if not any(is_at_or_below(path, named) for named in paths_in_cmd(stage))]


def overlapping_outs(graph: dict[str, Any]) -> list[tuple[str, str]]:
    outs = sorted(out for stage in all_instances(graph).values() for out in outs_of(stage))
    return [(first, second) for first, second in combinations(outs, 2) if is_at_or_below(second, first)]


def deps_that_nothing_makes(graph: dict[str, Any]) -> list[str]:
    """Deps below data/, models/ or metrics/ that are no stage's out, nor below or above one."""
    stages = [*all_instances(graph).values(), *map(body_of, graph["stages"].values())]  # a group may have no instance
    outs = [out for stage in stages for out in outs_of(stage)]
    deps = {dep for stage in all_instances(graph).values() for dep in paths(stage["deps"])}
    ours = [dep for dep in sorted(deps) if dep.startswith(("data/", "models/", "metrics/"))]
    return [dep for dep in ours if not any(is_at_or_below(dep, out) or is_at_or_below(out, dep) for out in outs)]


@pytest.mark.parametrize("name", STAGES)
def test_the_one_dep_of_code_is_the_manifest(name):
    deps = [dep for dep in paths(BODIES[name]["deps"]) if is_code(dep)]
    assert deps == ([] if name == FIRST else [manifest_path(name)])


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_its_script_and_its_metrics_carry_one_name(name):
    """And its section in params.yaml, which the test of the params sees to. What is trained has names of its own."""
    stage = BODIES[name]
    script = Path(script_of(name)).stem
    assert re.match(rf"(python -m stages\.|sh stages/launch\.sh ){script} --", stage["cmd"])
    assert name == script or name.startswith(f"{script}_")
    folders = ["training", "curves"] if name.startswith("train_") else [script]
    for path in paths([*(stage.get("metrics") or ()), *(stage.get("plots") or ())]):
        assert {*folders} & {*path.removesuffix(".json").split("/")}
    assert name not in sys.stdlib_module_names


def test_dvc_yaml_reads_as_a_plan():
    lines = (ROOT / "dvc.yaml").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 30 * len(STAGES)


def test_imports_are_such_as_the_closure_sees():
    """Absolute, by a statement: neither relative nor by a call, which would be missing from the manifests.

    But for a reward function, which a setting names; that is why the manifests list it.
    """
    for file in (ROOT / "stages").rglob("*.py"):
        for node in ast.walk(parsed(file)) if file.name != "function_worker.py" else ():
            assert not (isinstance(node, ast.ImportFrom) and node.level), file
            assert not (isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__")), file


def test_the_committed_manifests_are_of_this_code():
    written = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / MANIFESTS).iterdir()}
    scripts = {script_name(body["cmd"]) for name, body in BODIES.items() if name != FIRST}
    manifests = {name: manifest_of(f"stages/{name}.py", ROOT) for name in scripts}
    manifests["prepare_base"] += lines_of([CHAT_TEMPLATE], ROOT)
    assert written == manifests


@pytest.mark.parametrize("name", [name for name in STAGES if name != FIRST])
def test_params_declared_are_the_params_read(name):
    """Groups that run one script may read different ones of its params: only tasks draw, and so need the seed.

    The first stage depends on all of params.yaml.
    """
    script = script_name(BODIES[name]["cmd"])
    group = [body for body in BODIES.values() if script_name(body["cmd"]) == script]
    assert not wrong_params(script, {"params": [entry for body in group for entry in body.get("params") or ()]})


@pytest.mark.parametrize("group", ["files", "hub", "tasks", "arithmetic"])
def test_a_source_is_read_again_for_every_key_but_what_is_drawn_of_it(group):
    own = {"tasks": FilmReviewSettings, "arithmetic": ArithmeticSettings}
    model = ({"files": FileSource, "hub": HubSource} | own)[group]
    body = next(stage["do"] for stage in GRAPH["stages"].values() if stage.get("foreach") == f"${{sources.{group}}}")
    declared = {entry.rpartition(".")[2] for entry in body["params"] if "." in entry}
    assert declared == model.model_fields.keys() - {"weight", "rows"}


@pytest.mark.parametrize(("stage", "model"), [("evaluate", Evaluate), ("score_samples", ScoreSamples)])
def test_a_policy_is_measured_again_for_every_key_but_those_of_other_policies(stage, model):
    declared = {entry.split(".")[1] for entry in BODIES[stage]["params"] if entry.startswith(f"{stage}.")}
    assert declared | {"policies"} == model.model_fields.keys()
    assert f"{stage}.policies" not in BODIES[stage]["params"]


@pytest.mark.parametrize("name", STAGES)
def test_paths_of_the_command_are_declared_and_the_reverse(name):
    stage = BODIES[name]
    assert not undeclared_paths(stage)
    assert not paths_not_in_cmd(stage)


@pytest.mark.parametrize("name", STAGES)
def test_templated_keys_belong_to_a_declared_section(name):
    stage = BODIES[name]
    used = set(OF_SECTION.findall(" ".join([stage["cmd"], *paths(stage["deps"]), *outs_of(stage)])))
    assert used <= sections_of(stage)


@pytest.mark.parametrize("name", STAGES)
def test_no_value_of_params_stands_in_a_command(name):
    """A shell runs the command. A script is told by $DVC_STAGE which entry of its section it is run for."""
    assert "$" not in BODIES[name]["cmd"]


def test_every_section_of_params_is_some_stages():
    sections = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    declared = {section for stage in BODIES.values() for section in sections_of(stage)}
    assert set(sections) == declared


def test_each_out_is_declared_once_and_none_lies_in_another():
    assert not overlapping_outs(GRAPH)


def test_every_dep_of_data_and_models_is_made_by_a_stage():
    assert not deps_that_nothing_makes(GRAPH)


def test_the_graph_has_the_stages_of_the_documentation():
    assert list(all_instances(GRAPH)) == [
        FIRST,
        "read_source_task@film_reviews",
        "prepare_data",
        "prepare_base@base",
        *(f"tokenize_data@{kind}" for kind in ("sft", "preference", "prompts")),
        "train_sft@sft",
        "train_rm@rm",
        "ref_logprobs@sft",
        "train_dpo@dpo",
        "train_ppo@ppo",
        "train_grpo@grpo",
        *(f"{stage}@{policy}" for stage in ("evaluate", "score_samples") for policy in ("sft", "dpo", "ppo", "grpo")),
        "evaluate_rm@rm",
        "report",
    ]


def test_five_values_of_beta_share_one_run_of_the_reference():
    params = default_params()
    (policy,) = params["train_dpo"].values()
    for number in range(5):
        beta = policy["loss"] | {"beta": 0.05 * (number + 1)}
        params["train_dpo"][f"dpo{number}"] = policy | {"loss": beta}
    stages = all_instances(GRAPH, params)
    (reference,) = (name for name in stages if name.startswith("ref_logprobs"))
    assert stages[reference] == all_instances(GRAPH)[reference]
    assert sections_of(stages[reference]) == {"kernels", "ref_logprobs", "trust_remote_code"}
    trained = [stages[f"train_dpo@dpo{number}"] for number in range(5)]
    assert all(outs_of(stages[reference])[0] in paths(stage["deps"]) for stage in trained)
    assert len({str(stage["params"]) for stage in trained}) == 5


def test_how_a_stage_is_started_is_in_no_deps():
    stages = [stage for name, stage in BODIES.items() if name != FIRST]
    deps = {dep for stage in stages for dep in paths(stage["deps"])}
    assert not deps & {"stages", "stages/launch.sh", "runtime.yaml", "params.yaml", "Makefile", "requirements.lock"}


def test_package_files_that_are_in_no_deps_are_empty():
    assert [path for path in (ROOT / "stages").rglob("__init__.py") if path.read_bytes()] == []


def test_no_data_or_metrics_out_is_cached_in_git_or_left_out_of_both():
    """Metrics, curves and the report are in Git and not in DVC's cache; data and models the other way round."""
    for stage in all_instances(GRAPH).values():
        for entry in [*(stage.get("outs") or []), *(stage.get("metrics") or []), *(stage.get("plots") or [])]:
            ((path, options),) = entry.items() if isinstance(entry, dict) else ((entry, {}),)
            assert options.get("cache", True) == (not path.startswith(IN_GIT)), path


def test_git_ignores_what_dvc_tracks_and_nothing_else_of_the_graph():
    outs = [out for stage in all_instances(GRAPH).values() for out in outs_of(stage)]
    cached = {out for out in outs if not out.startswith(IN_GIT)}
    users_own = {"models/pretrained", "data/raw/hh-rlhf"}
    left_behind = {".scratch/train_rm-0a1b", "plots/curves.html", "models/.sft.partial", "metrics/.report.html.partial"}
    kept = {
        "data/raw/own.jsonl.dvc",
        "dvc.lock",
        "dvc.yaml",
        "params.yaml",
        "stages/templates/chat.jinja",
        ".dvc/config",
    }
    asked = sorted({*outs, *users_own, *left_behind, *kept})
    answer = subprocess.run(
        ["git", "check-ignore", "--no-index", *asked], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert set(answer.stdout.split()) == cached | users_own | left_behind


@pytest.mark.parametrize("name", computing_stages())
def test_training_cannot_see_the_gold_utility(name):
    """The gold utility is in the generator's code and in the prepared rows: training has neither."""
    deps = paths(all_instances(GRAPH)[name]["deps"])
    assert [file for file in code_of(name) if "gold" in file or "film" in file] == []
    assert [dep for dep in deps if dep.startswith(("data/prepared", "data/raw", "data/samples", "metrics"))] == []
    for file in code_of(name):
        assert "gold" not in (ROOT / file).read_text(encoding="utf-8"), file


# The checks themselves, on a project of three files.


@pytest.fixture
def project(tmp_path):
    """A script that imports a file at the top, which reads a key of the settings."""
    files = {
        "stages/train.py": "from stages.lib import top\n\nread_params('train', dict)\n",
        "stages/lib/top.py": "seed = params.read_value('seed', int)\n",
        "stages/lib/unused.py": "read_params('other', dict)\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


SMALL = {
    "stages": {
        "train": {
            "matrix": {"kind": ["a", "b"]},
            "cmd": (
                "sh stages/launch.sh train --rows data/${item.kind} --template ${train.page} --out models/${item.kind}"
            ),
            "deps": ["code_manifests/train.txt", "data/${item.kind}", "${train.page}"],
            "params": ["seed", "train"],
            "outs": ["models/${item.kind}"],
        },
        "make": {
            "cmd": "python -m stages.train --out data",
            "deps": ["code_manifests/make.txt"],
            "outs": ["data/a", {"data/b": {"cache": False}}],
        },
    }
}


def test_a_params_key_that_is_not_written_out_is_refused(project):
    (project / "stages/lib/top.py").write_text("read_params(section, dict)\n")
    with pytest.raises(ValueError, match=r"top\.py:1: the key must be written out"):
        params_read(code_of("train", project), project)


def changed(change) -> dict[str, Any]:
    graph = deepcopy(SMALL)
    change(graph["stages"])
    return graph


def test_a_right_graph_has_no_faults(project):
    train, make = SMALL["stages"].values()
    assert not wrong_params("train", train, project)
    assert not undeclared_paths(train)
    assert not paths_not_in_cmd(train)
    assert not undeclared_paths(make)
    assert not overlapping_outs(SMALL)
    assert not deps_that_nothing_makes(SMALL)


@pytest.mark.parametrize("params", [["seed"], ["train"], ["seed", "train", "other"], None])
def test_a_params_key_missing_or_superfluous_is_found(project, params):
    stage = changed(lambda stages: stages["train"].update(params=params))["stages"]["train"]
    assert wrong_params("train", stage, project) == {"seed", "train"} ^ set(params or ()) | (
        {"other"} & set(params or ())
    )


def test_an_undeclared_path_or_one_not_in_the_command_is_found():
    stage = changed(lambda stages: stages["train"]["deps"].remove("${train.page}"))["stages"]["train"]
    assert undeclared_paths(stage) == ["${train.page}"]
    stage = changed(lambda stages: stages["train"]["outs"].clear())["stages"]["train"]
    assert undeclared_paths(stage) == ["models/${item.kind}"]
    stage = changed(lambda stages: stages["train"]["deps"].append("data/c"))["stages"]["train"]
    assert paths_not_in_cmd(stage) == ["data/c"]


def test_an_out_declared_twice_or_in_another_is_found():
    twice = changed(lambda stages: stages["make"]["outs"].append("models/a"))
    assert overlapping_outs(twice) == [("models/a", "models/a")]
    within = changed(lambda stages: stages["make"]["outs"].append("models/b/log"))
    assert overlapping_outs(within) == [("models/b", "models/b/log")]


def test_a_dep_that_nothing_makes_is_found():
    graph = changed(lambda stages: stages["make"]["outs"].pop())
    assert deps_that_nothing_makes(graph) == ["data/b"]
