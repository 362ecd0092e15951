"""What is imported is asked for in pyproject.toml, and requirements.lock pins one version that fits."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.pipeline.closure import ROOT, imported_names, parsed

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
ASKED = [Requirement(line) for line in [*PROJECT["dependencies"], *EXTRAS]]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
PROVIDERS = packages_distributions()
PINNED = [Requirement(line) for line in LOCK if line and not line.startswith(("#", "-"))]


def missing_requirements(tree: ast.Module, file: str, asked: set[str]) -> set[str]:
    """Top-level names that a module imports and that no package asked for provides."""
    names = {name.split(".")[0] for name in imported_names(tree, file)} - set(sys.stdlib_module_names)
    ours = {"benchmarks", "stages", "tests"}
    return {name for name in names - ours if not asked & {canonicalize_name(one) for one in PROVIDERS.get(name, [])}}


@pytest.mark.parametrize("folder", ["benchmarks", "stages", "tests"])
def test_every_package_imported_is_asked_for(folder):
    asked = {canonicalize_name(requirement.name) for requirement in ASKED}
    missing = {
        (file, name)
        for path in (ROOT / folder).rglob("*.py")
        for file in [path.relative_to(ROOT).as_posix()]
        for name in missing_requirements(parsed(path), file, asked)
    }
    assert missing == set()


def test_an_import_that_nothing_asked_for_is_found():
    tree = ast.parse("import json, yaml, nowhere\nimport ruamel.yaml\nfrom stages.lib import params\n")
    assert missing_requirements(tree, "stages/x.py", {"ruamel-yaml", "numpy"}) == {"yaml", "nowhere"}


@pytest.mark.parametrize("requirement", ASKED, ids=str)
def test_the_lock_pins_a_version_that_fits(requirement):
    name = canonicalize_name(requirement.name)
    (pinned,) = [pin for pin in PINNED if canonicalize_name(pin.name) == name]
    (version,) = [specifier.version for specifier in pinned.specifier if specifier.operator == "=="]
    assert requirement.specifier.contains(version)


def test_the_lock_pins_everything_and_no_package_of_cuda():
    assert [str(pin) for pin in PINNED if [one.operator for one in pin.specifier] != ["=="]] == []
    assert [pin.name for pin in PINNED if pin.name.startswith(("nvidia", "cuda", "triton"))] == []
    assert "-c requirements-cuda.lock" in LOCK
