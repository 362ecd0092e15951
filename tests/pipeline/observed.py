"""What a stage really reads when it runs: each real script, tiny, in a process and a folder of its own.

    python -m tests.pipeline.observed PROJECT FOLDER    run all stages in FOLDER; what each read: observed.json

PROJECT is one in which every stage has run, so that all outs are there. Of `stages/` the folder holds the
declared deps alone: what is imported undeclared is not there, so the stage fails. Of `data/`, `models/` and `metrics/`
it holds the other stages' outs as well, as a project does that has run before: a stage could read them if they are
there, and do without if not. What it did read is then seen in three ways: its modules, in `sys.modules`; files opened
by Python, through an audit hook; and data, which Arrow and safetensors open past Python, by the time of last access.
The keys of params.yaml are recorded as the code looks them up.

The processes are forked from one that has loaded torch and its kin but nothing of `stages`, so that they start fast.
"""

import importlib
import importlib.abc
import importlib.machinery
import json
import os
import re
import runpy
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.pipeline.graph import FIRST, ROOT, all_instances, declared_code, load_graph, outs_of, paths
from tests.stages.tiny_pipeline import read_yaml, script, stage_options

HEAVY = (
    *("torch._dynamo", "datasets", "pandas", "matplotlib.backends.backend_svg", "accelerate", "deepspeed"),
    *("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto"),
    *("transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_tokenizers"),
)
ACCESSED_LONG_AGO = 0
DATA_FOLDERS = ("code_manifests", "data", "metrics", "models")


class RecordedSettings(dict):
    """The mapping in params.yaml, noting which of its keys are looked up."""

    def __init__(self, values: dict[str, Any], keys: set[str]) -> None:
        super().__init__(values)
        self.keys_read = keys

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read.add(key)
        return super().get(key, default)


class WatchParams(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes the `load_yaml` of `stages.lib.command.params` return settings that note what is read."""

    def __init__(self, keys: set[str]) -> None:
        self.keys = keys

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "stages.lib.command.params":
            return None
        self.found = importlib.machinery.PathFinder.find_spec(name, path, target)
        spec = importlib.machinery.ModuleSpec(name, self, origin=self.found.origin)
        spec.has_location = True
        return spec

    def exec_module(self, module: Any) -> None:
        self.found.loader.exec_module(module)
        load_yaml, params_file = module.load_yaml, module.PARAMS_FILE

        def load_and_watch(path: Path) -> dict[str, Any]:
            values = load_yaml(path)
            return RecordedSettings(values, self.keys) if path == params_file else values

        module.load_yaml = load_and_watch


def observe(
    project: Path, stage: str, declared: dict[str, list[str]], all_outs: list[str], target: Path
) -> dict[str, Any]:
    """Run one stage in a folder of its own below `target`. Raises RuntimeError if it fails.

    Returns:
        Sorted lists: `modules`; `files` that Python opened; `data`, the files of deps that were accessed, and
        `undeclared`, those of other stages' outs; `left_behind`, files written beside the outs; `params`.
    """
    folder = target / "project"
    others = [out for out in all_outs if out not in declared["outs"]]
    lay_out(project, folder, [*declared["deps"], *declared["code"]], others)
    laid = dict(data_files(folder))
    report = target / f"{stage}.json"
    process = os.fork()
    if process == 0:
        run_forked(folder, stage, report)
    _, status = os.waitpid(process, 0)
    if status != 0:
        raise RuntimeError(f"{stage} fails where only what it declares is there (status {status})")
    seen = json.loads(report.read_text())
    seen["data"] = sorted(accessed(folder, declared["deps"]))
    seen["undeclared"] = sorted(set(accessed(folder, others)) - set(seen["data"]))
    for out in declared["outs"]:
        remove(folder / out)
    seen["left_behind"] = sorted(name for name, written in data_files(folder) if laid.get(name) != written)
    shutil.rmtree(folder)
    return seen


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def lay_out(project: Path, folder: Path, deps: list[str], others: list[str]) -> None:
    """A folder with the settings, the package files of `stages/`, the deps, and of the outs `others` what is made.

    All is as if last accessed long ago.
    """
    packages = ["stages/__init__.py", "stages/lib/__init__.py"]
    made = [name for name in others if (project / name).exists()]
    for name in ["params.yaml", "runtime.yaml", "dvc.yaml", *packages, *made, *deps]:
        source, target = project / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)
    for file in folder.rglob("*"):
        os.utime(file, ns=(ACCESSED_LONG_AGO, file.stat().st_mtime_ns))


def run_forked(folder: Path, stage: str, report: Path) -> None:
    """The child: run the script as `python -m` would, write what was seen, and end."""
    status = 1
    try:
        output = os.open(report.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        os.environ["STAGEWISE_SCRATCH"] = str(report.with_suffix(".scratch"))
        sys.pycache_prefix = str(folder.with_name("compiled"))  # each file once, as all stages run at one place
        report.write_text(json.dumps(run_watched(folder, stage)))
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def run_watched(folder: Path, stage: str) -> dict[str, list[str]]:
    files: set[str] = set()
    keys: set[str] = set()

    def note_opened(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            path = os.path.relpath(os.path.abspath(arguments[0]), folder)  # noqa: PTH100 (a Path would open files)
            if not path.startswith("..") and os.path.isfile(path):  # noqa: PTH113
                files.add(path)

    sys.path[:] = [str(folder), *(entry for entry in sys.path if not (Path(entry or ".") / "stages").is_dir())]
    sys.path_importer_cache.clear()
    sys.meta_path.insert(0, WatchParams(keys))
    sys.argv = [f"stages.{script(stage)}", *stage_options(stage)]
    sys.addaudithook(note_opened)
    try:
        runpy.run_module(f"stages.{script(stage)}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    modules = [module.__file__ for name, module in sys.modules.items() if name.startswith("stages.")]
    code = {os.path.relpath(file, folder) for file in modules if file and not file.endswith("__init__.py")}
    return {
        "modules": sorted({*code, f"stages/{script(stage)}.py"}),
        "files": sorted(files),
        "params": sorted(keys),
    }


def accessed(folder: Path, paths: list[str]) -> Iterator[str]:
    for path in paths:
        below = [folder / path, *(folder / path).rglob("*")]
        yield from (
            str(file.relative_to(folder))
            for file in below
            if file.is_file() and file.stat().st_atime_ns != ACCESSED_LONG_AGO
        )


def data_files(folder: Path) -> Iterator[tuple[str, int]]:
    """The files below data/, metrics/ and models/, and when each was last written."""
    for top in DATA_FOLDERS:
        for file in (folder / top).rglob("*"):
            if file.is_file():
                yield str(file.relative_to(folder)), file.stat().st_mtime_ns


def access_times_are_kept(folder: Path) -> bool:
    """False where the file system is mounted with `noatime`."""
    probe = folder / "probe"
    probe.write_text("x")
    os.utime(probe, ns=(ACCESSED_LONG_AGO, time.time_ns()))
    probe.read_text()
    return probe.stat().st_atime_ns != ACCESSED_LONG_AGO


def declared_by_stage(params: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Deps, outs and params keys of every stage of dvc.yaml, with the values of `params` put in."""

    def filled_in(path: str) -> str:
        return re.sub(r"\$\{(\w+)\.(\w+)\}", lambda match: str(params[match[1]][match[2]]), path)

    everything = [path.relative_to(ROOT).as_posix() for path in (ROOT / "stages").rglob("*.*") if path.suffix != ".pyc"]
    return {
        name: {
            "code": everything if name == FIRST else declared_code(name),
            "deps": list(dict.fromkeys(filled_in(dep) for dep in paths(stage["deps"]))),
            "outs": outs_of(stage),
            "params": list(stage.get("params") or ()),
        }
        for name, stage in all_instances(load_graph()).items()
    }


def observe_all(project: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Run every stage of dvc.yaml with the outs of `project`, below `folder`."""
    declared = declared_by_stage(read_yaml(project / "params.yaml"))
    for name in [name for name in sys.modules if name == "stages" or name.startswith("stages.")]:
        del sys.modules[name]
    for name in HEAVY:
        importlib.import_module(name)
    outs = [out for stage in declared.values() for out in stage["outs"]]
    return {
        stage: {"declared": wanted, **observe(project, stage, wanted, outs, folder)}
        for stage, wanted in declared.items()
    }


def main() -> None:
    project, folder = (Path(word).resolve() for word in sys.argv[1:])
    if not access_times_are_kept(folder):
        sys.exit(f"{folder}: the file system keeps no times of access, by which reads are seen")
    (folder / "observed.json").write_text(json.dumps(observe_all(project, folder), indent=2))


if __name__ == "__main__":
    main()
