"""What is imported is asked for in pyproject.toml, and the locks pin one version that fits, with its hashes."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.pipeline.graph import ROOT, imported_names, parsed

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
ASKED = [Requirement(line) for line in [*PROJECT["dependencies"], *EXTRAS]]
PROVIDERS = packages_distributions()
BESIDE = "benchmarks/trl_steps.py"  # runs in an environment of its own
FROM_CUDA = ("cuda-", "nvidia-", "triton")


def pinned(lock: str) -> dict[Requirement, list[str]]:
    """The requirements in a lock, with their hashes."""
    text = (ROOT / lock).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split(" --hash=") for line in text.splitlines() if line and not line.startswith("#")]
    return {Requirement(first): [one.strip() for one in hashes] for first, *hashes in lines}


LOCKED = pinned("requirements.lock")
CUDA = pinned("requirements-cuda.lock")
TORCH = pinned("requirements-torch.lock")


def missing_requirements(tree: ast.Module, asked: set[str]) -> set[str]:
    """Top-level names that a module imports and that no package asked for provides."""
    names = {name.split(".")[0] for name in imported_names(tree)} - set(sys.stdlib_module_names)
    ours = {"benchmarks", "stages", "tests"}
    return {name for name in names - ours if not asked & {canonicalize_name(one) for one in PROVIDERS.get(name, [])}}


@pytest.mark.parametrize("folder", ["benchmarks", "stages", "tests"])
def test_every_package_imported_is_asked_for(folder):
    asked = {canonicalize_name(requirement.name) for requirement in ASKED}
    missing = {
        (file, name)
        for path in (ROOT / folder).rglob("*.py")
        for file in [path.relative_to(ROOT).as_posix()]
        if file != BESIDE
        for name in missing_requirements(parsed(path), asked)
    }
    assert missing == set()


def test_what_runs_beside_the_project_has_requirements_of_its_own_with_the_same_torch_and_transformers():
    own = pinned("benchmarks/requirements-trl.txt")
    names = {requirement.name for requirement in own}
    assert {name.split(".")[0] for name in imported_names(parsed(ROOT / BESIDE))} - set(
        sys.stdlib_module_names
    ) <= names
    shared = {str(one) for one in own if one.name in ("torch", "transformers")}
    assert shared == {str(one) for one in (*LOCKED, *TORCH) if one.name in ("torch", "transformers")}


def test_an_import_that_nothing_asked_for_is_found():
    tree = ast.parse("import json, yaml, nowhere\nimport ruamel.yaml\nfrom stages.lib.command import params\n")
    assert missing_requirements(tree, {"ruamel-yaml", "numpy"}) == {"yaml", "nowhere"}


@pytest.mark.parametrize("requirement", ASKED, ids=str)
def test_the_lock_pins_a_version_that_fits(requirement):
    name = canonicalize_name(requirement.name)
    (pin,) = [pin for pin in (*LOCKED, *TORCH) if canonicalize_name(pin.name) == name]
    (version,) = [specifier.version for specifier in pin.specifier if specifier.operator == "=="]
    assert requirement.specifier.contains(version)


def test_everything_but_torch_has_one_version_and_hashes():
    for pin, hashes in (LOCKED | CUDA).items():
        assert [one.operator for one in pin.specifier] == ["=="], pin
        assert hashes, pin
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", one) for one in hashes), pin
    names = [pin.name for pin in (*LOCKED, *CUDA, *TORCH)]
    assert len(set(names)) == len(names)
    assert [(pin.name, hashes) for pin, hashes in TORCH.items()] == [("torch", [])]


def test_what_a_torch_for_the_cpu_never_loads_has_a_lock_of_its_own():
    assert [pin.name for pin in LOCKED if pin.name.startswith(FROM_CUDA)] == []
    assert [pin.name for pin in CUDA if not pin.name.startswith(FROM_CUDA)] == []
    for machine in ("x86_64", "aarch64"):
        for system in ("linux", "darwin"):
            environment = {"platform_machine": machine, "sys_platform": system, "python_full_version": "3.12.0"}
            asked = [pin.name for pin in CUDA if pin.marker.evaluate(environment)]
            assert len(asked) == (len(CUDA) if system == "linux" else 0)


def test_the_locks_leave_out_nothing_that_a_package_needs():
    """`make setup` installs without dependencies."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
