"""dvc.yaml, and what the source of its stages says of them."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.lib.operations.code_closure import MANIFESTS, closure

ROOT = Path(__file__).resolve().parents[2]
FIRST = "code_manifest"  # the stage that checks the settings and writes the manifests
LAUNCHER = "stages/launch.sh"


def load_graph(root: Path = ROOT) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load((root / "dvc.yaml").read_text(encoding="utf-8"))


def script_of(stage: str) -> str:
    """The script of a stage, or of an instance of one with a matrix: they carry one name."""
    return f"stages/{stage.partition('@')[0]}.py"


def manifest_path(stage: str) -> str:
    return f"{MANIFESTS}/{stage.partition('@')[0]}.txt"


def code_of(stage: str, root: Path = ROOT) -> list[str]:
    """Every file that a stage runs or fills, also those that manifests leave out."""
    return closure([script_of(stage)], root)


def params_read(files: list[str], root: Path = ROOT) -> set[str]:
    """Top-level keys of params.yaml that code reads, by its calls of `read_params`, `read_value`, `read_seed`."""
    keys = set()
    for file in files:
        for node in ast.walk(parsed(root / file)) if file.endswith(".py") else ():
            if isinstance(node, ast.Call) and called_name(node) == "read_seed":
                keys.add("seed")
            elif isinstance(node, ast.Call) and called_name(node) in ("read_params", "read_value"):
                if not (node.args and is_text(node.args[0])):
                    raise ValueError(f"{file}:{node.lineno}: the key must be written out, or no test can see it")
                keys.add(node.args[0].value)
    return keys


def imported_names(tree: ast.Module) -> Iterator[str]:
    """Dotted names of what a module imports, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def called_name(call: ast.Call) -> str:
    return getattr(call.func, "id", None) or getattr(call.func, "attr", "")


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
