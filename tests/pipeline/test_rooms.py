"""The packages of stages/lib, and what each may import."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.pipeline.graph import ROOT, imported_names, parsed

MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for file in (ROOT / "stages").rglob("*.py")
    if file.name != "__init__.py"
}
ROOMS = sorted(path.name for path in (ROOT / "stages/lib").iterdir() if path.is_dir() and path.name != "__pycache__")
# A package of stages/lib, and what none of its modules may import, be it by way of a function.
FORBIDDEN = {
    "command": ("torch",),
    "settings": ("torch",),
    "data": ("stages.lib.compute", "stages.lib.tasks"),
    "models": ("stages.lib.compute", "stages.lib.tasks"),
    "compute": ("stages.lib.runs", "stages.lib.tasks"),
    "objectives": ("stages.lib.runs", "stages.lib.tasks"),
    "rl": ("stages.lib.runs", "stages.lib.tasks"),
    "runs": ("stages.lib.tasks",),
}


def imports_of(module: str) -> set[str]:
    """The modules of ours that one imports, and the names of all others."""
    tree = parsed(MODULES[module])
    names = {*imported_names(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[2] if parts[:2] == ["stages", "lib"] else ""


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_nothing_that_it_may_not(room: str) -> None:
    for module in MODULES:
        if room_of(module) == room:
            wrong = [name for name in imports_of(module) for bad in FORBIDDEN.get(room, ()) if name.startswith(bad)]
            assert wrong == [], module


def test_operations_import_nothing_of_ours_but_the_errors() -> None:
    for module in MODULES:
        if room_of(module) == "operations":
            ours = {name for name in imports_of(module) if name in MODULES}
            assert {name for name in ours if room_of(name) != "operations"} <= {"stages.lib.command.errors"}, module


def test_nothing_imports_a_stage_and_only_stages_import_tasks() -> None:
    stages = {name for name in MODULES if name.count(".") == 1}
    for module in MODULES:
        for name in imports_of(module):
            assert name not in stages, f"{module} imports {name}"
            if name.startswith("stages.lib.tasks"):
                assert module in stages or room_of(module) == "tasks", module


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: {name for name in imports_of(module) if name in MODULES} - {module} for module in MODULES}
    assert len([*TopologicalSorter(graph).static_order()]) == len(MODULES)


def test_every_module_of_a_room_is_small() -> None:
    """A file of more than 450 lines holds two concepts."""
    assert [name for name, file in MODULES.items() if len(file.read_text(encoding="utf-8").splitlines()) > 460] == []


def test_the_readme_has_a_line_for_each_package() -> None:
    text = Path(ROOT / "README.md").read_text(encoding="utf-8")
    assert [room for room in ROOMS if f"stages/lib/{room}/" not in text] == []
