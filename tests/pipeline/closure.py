"""What a stage's code is made of, and which params keys it reads, found in the source without running it.

    python -m tests.pipeline.closure            print the code files of each stage of dvc.yaml
    python -m tests.pipeline.closure --write    bring the code part of every deps list of dvc.yaml up to date

The code of a stage is its script and every file of `stages/` that the script imports, directly or not, at the top or in
a function, by an import statement or by `importlib.import_module("stages.…")`; and any other file below `stages/` (a
template) whose path or name stands as a text of its own in one of those. Package `__init__.py` files are left out: they
must be empty.
"""

import argparse
import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = "stages/launch.sh"
SCRIPT_IN_CMD = re.compile(rf"(?:python -m stages\.|sh {LAUNCHER} )(\w+)")


def round_trip_yaml() -> YAML:
    """A reader and writer that keeps comments, order and line breaks as they are."""
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.preserve_quotes = True
    yaml.width = 4096
    return yaml


def script_of(cmd: str) -> str:
    """Path of the script that a stage's command starts."""
    match = SCRIPT_IN_CMD.match(cmd)
    if match is None:
        raise ValueError(f"starts no script of stages/: {cmd}")
    return f"stages/{match[1]}.py"


def code_files(script: str, root: Path = ROOT) -> list[str]:
    """The code of a stage, script included: sorted paths relative to the top folder."""
    found, pending = set(), [script]
    while pending:
        file = pending.pop()
        if file in found:
            continue
        found.add(file)
        if file.endswith(".py"):
            tree = parsed(root / file)
            pending += imported_files(tree, file, root)
            pending += named_files(tree, root)
    return sorted(found)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_files(tree: ast.Module, file: str, root: Path) -> Iterator[str]:
    """Files of `stages/` that a module imports, wherever the import stands."""
    for name in imported_names(tree, file):
        path = Path(*name.split("."))
        if path.parts[0] == "stages" and (root / path.with_suffix(".py")).is_file():
            yield path.with_suffix(".py").as_posix()


def imported_names(tree: ast.Module, file: str) -> Iterator[str]:
    """Dotted names that may be modules: for `from a import b` both `a` and `a.b`."""
    package = Path(file).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*parents, *([node.module] if node.module else [])))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__"):
            yield from (argument.value for argument in node.args[:1] if is_text(argument))


def named_files(tree: ast.Module, root: Path) -> Iterator[str]:
    """Files below `stages/` that are no Python and whose name stands as a text in a module."""
    texts = {node.value for node in ast.walk(tree) if is_text(node)}
    names = {Path(text).name for text in texts if text and not re.search(r"\s", text)}
    for path in sorted((root / "stages").rglob("*")):
        file = path.relative_to(root).as_posix()
        if path.name in names and path.is_file() and path.suffix not in (".py", ".pyc") and file != LAUNCHER:
            yield file


def params_read(files: list[str], root: Path = ROOT) -> set[str]:
    """Top-level keys of params.yaml that code reads, by its calls of `read_params` and `read_value`."""
    keys = set()
    for file in files:
        for node in ast.walk(parsed(root / file)) if file.endswith(".py") else ():
            if isinstance(node, ast.Call) and called_name(node) in ("read_params", "read_value"):
                if not (node.args and is_text(node.args[0])):
                    raise ValueError(f"{file}:{node.lineno}: the key must be written out, or no test can see it")
                keys.add(node.args[0].value)
    return keys


def called_name(call: ast.Call) -> str:
    return getattr(call.func, "id", None) or getattr(call.func, "attr", "")


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def is_code(dep: str) -> bool:
    return dep.startswith("stages/")


def with_code(deps: list[str], files: list[str]) -> list[str]:
    """A deps list with its code part replaced: data and models as they stand, then the code."""
    return [dep for dep in deps if not is_code(dep)] + files


def write_code_deps(graph_file: Path, root: Path = ROOT) -> None:
    """Rewrite the code part of every deps list, and nothing else."""
    yaml = round_trip_yaml()
    graph = yaml.load(graph_file.read_text(encoding="utf-8"))
    for stage in graph["stages"].values():
        deps = stage["deps"]
        deps[:] = with_code(list(deps), code_files(script_of(stage["cmd"]), root))
    with graph_file.open("w", encoding="utf-8") as file:
        yaml.dump(graph, file)


def load_graph(root: Path = ROOT) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load((root / "dvc.yaml").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description="The code files of each stage of dvc.yaml.")
    parser.add_argument("--write", action="store_true", help="bring the deps lists of dvc.yaml up to date")
    if parser.parse_args().write:
        write_code_deps(ROOT / "dvc.yaml")
        return
    for name, stage in load_graph()["stages"].items():
        print(name, *code_files(script_of(stage["cmd"])), sep="\n  ")


if __name__ == "__main__":
    main()
