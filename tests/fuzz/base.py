"""The project that all cases start from: the tiny pipeline, made once a run by the real stages in forked children."""

import contextlib
import functools
import importlib
import os
import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from stages.lib.command.hashing import dvc_hash, file_hash
from tests.fuzz.case import Whole, put
from tests.fuzz.child import run_stage
from tests.fuzz.mutations import yaml_text
from tests.pipeline.graph import body_of, load_graph, outs_of, put_in, stage_names
from tests.proofs.forked_stage import load_libraries
from tests.stages.tiny_pipeline import new_project, read_yaml, stage_options

# No step more than it takes to meet every row, and curves of which a page is drawn in a second.
SMALLER = {
    "train_sft": {"sft": {"epochs": 1.0}},
    "train_ppo": {"ppo": {"iterations": 2, "epochs": 1}},
    "train_grpo": {"grpo": {"iterations": 2, "epochs": 1}},
    "evaluate": {"max_prompts": 6, "max_new_tokens": 8, "bootstrap_resamples": 100},
}
SHOWN_COLUMNS = 2
SCRATCH = ".scratch"
BASE = "base"
MADE = tuple(stage for stage in stage_names() if stage != "report")
LATER = ("pandas", "matplotlib.figure", "matplotlib.backends.backend_svg", "pyarrow.parquet", "jinja2.sandbox")


def load() -> None:
    """Import what the stages import, so that a forked child need not."""
    load_libraries(list(stage_names()))
    for name in LATER:
        importlib.import_module(name)


def make(folder: Path) -> Path:
    """Make the base project in `folder`. Raises RuntimeError if a stage fails on sound inputs."""
    folder.mkdir(parents=True)
    new_project(folder)
    write_settings(folder / "params.yaml", overlaid(read_yaml(folder / "params.yaml"), SMALLER))
    for stage in MADE:
        ended = run_stage(folder, stage, options_of(stage), 300.0, unprivileged=False)
        if ended.status != 0:
            raise RuntimeError(f"{stage} fails on the base project: {ended.stdout[-500:]} {ended.stderr[-2000:]}")
    for curve in (folder / "metrics/curves").glob("*.csv"):
        rows = [line.split(",")[: SHOWN_COLUMNS + 1] for line in curve.read_text().splitlines()]
        put(curve, "".join(",".join(row) + "\n" for row in rows))
    return folder


def copy(base: Path, folder: Path, needs: tuple[str, ...], stages: tuple[str, ...]) -> None:
    """A copy of the base by hard links: what the cases of an area need, without the outs of `stages`."""
    folder.mkdir()
    (folder / "stages").symlink_to((base / "stages").resolve())
    for name in ("params.yaml", "runtime.yaml", "dvc.yaml", *needs):
        source, target = base / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, copy_function=_link, symlinks=True, dirs_exist_ok=True)
        else:
            _link(source, target)
    for out in (folder / out for stage in stages for out in outs(stage)):
        if out.is_dir():
            shutil.rmtree(out)
        elif out.exists():
            out.unlink()


def _link(source: str | Path, target: str | Path) -> None:
    """A hard link, or a copy of training state, whose files are written on in place."""
    if SCRATCH in Path(source).parts:
        shutil.copyfile(source, target)
        return
    with contextlib.suppress(FileExistsError):
        os.link(source, target)


@functools.cache
def outs(stage: str) -> tuple[str, ...]:
    """The paths that a stage of dvc.yaml writes, whatever its entry: not each stands in the default settings."""
    group, _, entry = stage.partition("@")
    body = body_of(load_graph()["stages"][group])
    for placeholder in ("${key}", "${item}", "${item.kind}"):
        body = put_in(body, placeholder, entry)
    return tuple(outs_of(body))


def other_than_base(folder: Path, stage: str) -> str | None:
    """Which out of a stage is not, to the byte, that of the base project; curves were cut there and are left out."""
    base = folder.parent / BASE
    for out in outs(stage):
        both = (folder / out).exists() and (base / out).exists() and not out.endswith(".csv")
        if both and dvc_hash(folder / out) != dvc_hash(base / out):
            return f"{out} is not what an undisturbed run makes"
    return None


@functools.cache
def options_of(stage: str) -> list[str]:
    """The options with which dvc.yaml starts a stage; not to be changed."""
    return stage_options(stage)


def overlaid(settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `settings` with `values` laid over it, key by key; keys that are not there are added."""
    copied = deepcopy(dict(settings))
    for key, value in values.items():
        both = isinstance(value, Mapping) and isinstance(copied.get(key), dict) and not isinstance(value, Whole)
        copied[key] = overlaid(copied[key], value) if both else value
    return copied


@functools.cache
def settings_of(path: Path) -> dict[str, Any]:
    """The settings of the base project; not to be changed."""
    return read_yaml(path)


def write_settings(path: Path, values: Mapping[str, Any]) -> None:
    """Write a settings file in JSON's form of YAML, which is a hundred times as quick to write."""
    put(path, yaml_text(values))


def digest(base: Path) -> dict[str, str]:
    """The hash of every file of the base project: no case may change one."""
    files = (path for path in base.rglob("*") if path.is_file() and not path.is_relative_to(base / "stages"))
    return {path.relative_to(base).as_posix(): file_hash(path) for path in files}
