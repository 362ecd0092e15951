"""Two stages run as they are, and once without each module of stages/lib/operations: one that does nothing is there.

    python -m tests.lib.operations.idle FOLDER    writes FOLDER/outs.json: module (or "") → hash of each out

The processes are forked from one that has loaded torch and its kin, so that they start fast.
"""

import hashlib
import importlib
import inspect
import json
import os
import runpy
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from tests.pipeline.graph import ROOT, all_instances, load_graph, outs_of
from tests.stages.tiny_pipeline import change, contents, new_project, script, stage_options

PACKAGE = "stages.lib.operations"
MODULES = sorted(path.stem for path in (ROOT / "stages/lib/operations").glob("*.py") if path.stem != "__init__")
BEFORE = ("read_source_task@film_reviews", "prepare_data", "prepare_base@base", "tokenize_data@sft")
BEFORE += ("tokenize_data@preference",)
STAGES = ("train_sft@sft", "ref_logprobs@sft")
HEAVY = ("torch._dynamo", "datasets", "deepspeed", "transformers.models.llama.modeling_llama")
# The least that works where the code needs an answer: what code runs, which only names a folder of training state, and
# where that lies.
ANSWERS: dict[str, dict[str, Any]] = {
    "code_closure": {"running_hash": lambda: "0" * 64},
    "scratch_root": {"scratch_root": lambda: Path("elsewhere")},
}


def idle(module: ModuleType) -> ModuleType:
    """A module with the same names: its functions return nothing, its objects have methods that do nothing."""
    stub = ModuleType(module.__name__)
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        kind = type(value)
        if own and inspect.isclass(value):
            value = idle_class(value)
        elif own and callable(value):
            value = idle_call(value)
        elif kind.__module__ == module.__name__:
            value = idle_class(kind)()
        setattr(stub, name, value)
    for name, value in ANSWERS.get(module.__name__.rpartition(".")[2], {}).items():
        setattr(stub, name, value)
    return stub


def idle_call(function: Callable[..., Any]) -> Callable[..., Any]:
    is_context = inspect.isgeneratorfunction(inspect.unwrap(function))
    return lambda *_, **__: nullcontext() if is_context else None


def idle_class(given: type) -> type:
    methods = {name: idle_call(value) for name, value in vars(given).items() if inspect.isfunction(value)}
    enter = {"__init__": lambda *_, **__: None, "__enter__": lambda self: self}
    return type(given.__name__, (), methods | enter)


def run_stages(folder: Path, stages: tuple[str, ...], module: str) -> None:
    """Run stages in turn in a forked process, without `module`. Raises RuntimeError if one fails."""
    child = os.fork()
    if child == 0:
        be_the_child(folder, stages, module)
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"without {module}: {(folder / 'output').read_text()}")


def be_the_child(folder: Path, stages: tuple[str, ...], module: str) -> NoReturn:
    status = 1
    try:
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        os.environ["STAGEWISE_SCRATCH"] = ".scratch"
        stub = idle(importlib.import_module(f"{PACKAGE}.{module}")) if module else None
        for name in [name for name in sys.modules if name == "stages" or name.startswith("stages.")]:
            del sys.modules[name]
        if stub:
            sys.modules[stub.__name__] = stub
        for stage in stages:
            sys.argv = [script(stage), *stage_options(stage)]
            try:
                runpy.run_module(f"stages.{script(stage)}", run_name="__main__", alter_sys=True)
            except SystemExit as end:
                if end.code:
                    raise
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        sys.stdout.flush()
        os._exit(status)


def outs_without(folder: Path, project: Path, module: str) -> dict[str, str]:
    """Path of each file that the stages wrote → its hash."""
    own = folder / (module or "as_it_is")
    shutil.copytree(project, own, symlinks=True)
    run_stages(own, STAGES, module)
    outs = [out for stage in STAGES for out in outs_of(all_instances(load_graph())[stage])]
    return {
        f"{out}/{name}": hashlib.sha256(content).hexdigest()
        for out in outs
        for name, content in contents(own / out).items()
    }


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    for name in HEAVY:
        importlib.import_module(name)
    (folder / "project").mkdir()
    project = new_project(folder / "project")
    change(project / "runtime.yaml", {"default": {"trackers": ["tensorboard"], "checkpoint_seconds": 0.0}})
    run_stages(project, BEFORE, "")
    found = {module: outs_without(folder, project, module) for module in ("", *MODULES)}
    (folder / "outs.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
