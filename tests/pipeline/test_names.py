"""One word for one thing: no class, type or public function of stages/ has the name of another, nor has a module."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from stages.lib.tasks.task import Task
from tests.pipeline.graph import ROOT, parsed

MODULES = [file for file in sorted((ROOT / "stages").rglob("*.py")) if file.name != "__init__.py"]


def types_in(file: Path) -> Iterator[str]:
    """Classes, and names like theirs that stand for a type."""
    for node in parsed(file).body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            yield from (name for name in names if name[0].isupper() and not name.isupper())


def functions_in(file: Path) -> Iterator[str]:
    """Public functions but for a script's `main` and for those that make a module a task."""
    expected = {"main"} | (vars(Task).keys() if file.parent.name == "tasks" else set())
    for node in parsed(file).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name not in expected:
            yield node.name


def places(names_in) -> dict[str, list[str]]:
    """Each name that more than one module has, with the modules."""
    found = defaultdict(list)
    for file in MODULES:
        for name in names_in(file):
            found[name].append(file.relative_to(ROOT).as_posix())
    return {name: files for name, files in found.items() if len(files) > 1}


def test_no_two_types_have_one_name() -> None:
    assert places(types_in) == {}


def test_no_two_functions_have_one_name() -> None:
    assert places(functions_in) == {}


def test_only_settings_are_named_like_what_they_are_settings_of() -> None:
    found = places(lambda file: [file.stem] if file.parent.name != "settings" else [])
    assert found == {}


def test_a_second_task_may_have_the_functions_of_a_task() -> None:
    assert list(functions_in(ROOT / "tests/lib/tasks/sums.py")) == []
