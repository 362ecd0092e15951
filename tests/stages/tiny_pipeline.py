"""A whole pipeline in a temporary folder, made by the real scripts, small enough to be made once a test session."""

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.lib.command.run import run_or_say_why_not
from stages.lib.operations.code_closure import script_name
from stages.lib.settings.declaration import block
from stages.lib.settings.prepare_base import ModelOfFolder, ModelOfHub
from stages.lib.settings.sections import default_params
from tests.loaded_python import loaded_python
from tests.pipeline.graph import training_stages

ITEM_OPTIONS = {"tokenize_data": "--kind"}  # by hand: stages that learn from DVC which item they run for
# The report depends on these, also where nothing has been written to one.
REPORT_FOLDERS = (
    "data/sample_scores",
    "data/samples",
    *(f"metrics/{name}" for name in ("curves", "evaluate", "evaluate_rm", "sample_pairs", "score_samples", "training")),
)
PROJECT = Path(__file__).resolve().parents[2]
OPTIMIZER = {"warmup_ratio": 0.0, "max_grad_norm": 1.0}
TINY = {
    "sources": {
        "tasks": {
            "film_reviews": {"sft_rows": 64, "preference_rows": 48, "prompt_rows": 32, "validation_rows": 12}
            | {"test_rows": 12}
        }
    },
    "prepare_base": {
        "scratch": {
            "base": {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2}
            | {"key_value_heads": 2}
        }
    },
    "tokenize_data": {"max_length": 192, "max_prompt_length": 128},
    "train_sft": {"sft": {"epochs": 2.0, "batch_size": 8, "eval_every": 4}},
    "train_rm": {"rm": {"batch_size": 8, "eval_every": 3, "epochs": 1.0, "keep": "best"}},
    "train_dpo": {"dpo": {"batch_size": 8, "eval_every": 3, "epochs": 1.0}},
    "train_ppo": {
        "ppo": {"iterations": 3, "rollout_batch_size": 8, "minibatch_size": 4, "max_new_tokens": 12, "epochs": 2}
        | {"critic_warmup_iterations": 0}
    },
    "train_grpo": {
        "grpo": {"iterations": 3, "rollout_batch_size": 4, "samples_per_prompt": 2, "minibatch_size": 4}
        | {"max_new_tokens": 12, "epochs": 2}
    },
    "evaluate": {"max_new_tokens": 12, "bootstrap_resamples": 200},
    "score_samples": {"bootstrap_resamples": 200},
}


def lay_over(settings: dict[str, Any], values: dict[str, Any]) -> None:
    """A block that names its `type` replaces the one that stands there."""
    for key, value in values.items():
        if isinstance(value, dict) and "type" not in value and settings.get(key):
            lay_over(settings[key], value)
        else:
            assert key in settings, f"params.yaml has no key {key}"
            settings[key] = value


def read_yaml(path: Path) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(path.read_text())


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(values, file)


def change(path: Path, values: dict[str, Any]) -> None:
    """Lay `values` over a YAML file."""
    settings = read_yaml(path)
    lay_over(settings, values)
    write_yaml(path, settings)


ENTRIES = dict(key.split("@") for key in training_stages()) | {"ref_logprobs": "sft"}


def change_entries(folder: Path, values: dict[str, dict[str, Any]]) -> None:
    """Lay the values of a section over those of its one entry, where a section has entries."""
    named = {section: {ENTRIES[section]: own} if section in ENTRIES else own for section, own in values.items()}
    change(folder / "params.yaml", named)


def use_base(folder: Path, group: str, **changed: Any) -> None:
    """Make one model of a group of prepare_base (files, hub) the only model to start from."""
    model = {"files": ModelOfFolder, "hub": ModelOfHub}[group]
    params = read_yaml(folder / "params.yaml")
    params["prepare_base"] = {"scratch": {}, "files": {}, "hub": {}} | {group: {"base": block(model, **changed)}}
    write_yaml(folder / "params.yaml", params)


def new_project(folder: Path) -> Path:
    """A folder with tiny settings, in which the scripts can run."""
    settings = default_params()
    lay_over(settings, TINY)
    write_yaml(folder / "params.yaml", settings)
    runtime = read_yaml(PROJECT / "runtime.yaml")
    runtime["default"]["rows_per_partial_result"] = 16  # several partial results of so few rows
    runtime["default"]["threads"] = 1  # more gain nothing at this size, and hinder what runs beside
    write_yaml(folder / "runtime.yaml", runtime)
    (folder / "dvc.yaml").write_bytes((PROJECT / "dvc.yaml").read_bytes())
    for kept in REPORT_FOLDERS:
        (folder / kept).mkdir(parents=True)
        (folder / kept / ".gitkeep").touch()
    for code in ("stages", "rewards"):
        (folder / code).symlink_to(PROJECT / code)
    shutil.copytree(PROJECT / "code_manifests", folder / "code_manifests")
    return folder


def stage_options(stage: str, **changed: str) -> list[str]:
    """The options with which dvc.yaml starts a stage, as a flat list; `changed` replaces single paths."""
    name, _, item = stage.partition("@")
    words = command(stage).split()
    options = words[words.index(next(word for word in words if word.startswith("--"))) :]
    for option, value in changed.items():
        options[options.index(f"--{option.replace('_', '-')}") + 1] = value
    return [*options, *([ITEM_OPTIONS.get(name, "--name"), item] if item else [])]


def command(stage: str) -> str:
    """What dvc.yaml runs, without the name of an entry, which DVC gives in the environment."""
    group = read_yaml(PROJECT / "dvc.yaml")["stages"][stage.partition("@")[0]]
    return group.get("do", group)["cmd"]


def script(stage: str) -> str:
    """Several groups of stages may run one."""
    return script_name(command(stage))


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Run in `folder`, with its own scratch folder."""
    before, scratch = Path.cwd(), os.environ.get("STAGEWISE_SCRATCH")
    os.chdir(folder)
    os.environ["STAGEWISE_SCRATCH"] = str(folder / ".scratch")
    try:
        yield
    finally:
        os.chdir(before)
        if scratch is None:
            del os.environ["STAGEWISE_SCRATCH"]
        else:
            os.environ["STAGEWISE_SCRATCH"] = scratch


def call(folder: Path, stage: str, **changed: str) -> None:
    """Run a stage's `main` in this process, with the paths of dvc.yaml."""
    options = stage_options(stage, **changed)
    arguments: dict[str, Any] = {
        name[2:].replace("-", "_"): value for name, value in zip(options[::2], options[1::2], strict=True)
    }
    module = importlib.import_module(f"stages.{script(stage)}")
    for name, value in arguments.items():
        arguments[name] = value if name in ("kind", "name") else Path(value)
    with inside(folder):
        module.main(**arguments)


def refusal(folder: Path, stage: str, capsys: pytest.CaptureFixture, **changed: str) -> str:
    """The one line with which a stage's command ends, with exit code 2, in this process."""
    capsys.readouterr()
    words = sys.argv
    sys.argv = [script(stage), *stage_options(stage, **changed)]
    try:
        with inside(folder), pytest.raises(SystemExit) as ended:
            run_or_say_why_not(importlib.import_module(f"stages.{script(stage)}").main)
    finally:
        sys.argv = words
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2, lines
    assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True], lines
    assert all(line.startswith("warning: ") for line in lines[:-1]), lines
    return lines[-1]


def start(
    folder: Path, stage: str, *, launch: str = "", base_environment: dict[str, str] | None = None, **changed: str
) -> subprocess.Popen:
    """Start a stage as its own process, its libraries loaded, or under the launcher `launch`, with dvc.yaml's paths."""
    environment = {**(base_environment or os.environ), "PYTHONPATH": str(PROJECT)}
    environment["STAGEWISE_SCRATCH"] = str(folder / ".scratch")
    words = launch.split() or [*loaded_python(environment), "-m"]
    return subprocess.Popen(
        [*words, f"stages.{script(stage)}", *stage_options(stage, **changed)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a path, or the file itself, by relative name."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}
