"""The tiny pipeline, made once a session; tests copy it before they change it. And the order of the test files.

Those that take minutes come first, so that none is left for one process alone.

Tests of properties draw the same examples in every run, and may take as long as a loaded machine needs.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from tests import loaded_python
from tests.pipeline.graph import stage_names
from tests.stages.tiny_pipeline import call, new_project

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")

LONG = (
    "tests/pipeline/test_repro.py",
    "tests/stages/test_equivalence.py",
    "tests/stages/test_kills.py",
    "tests/stages/test_launchers.py",
    "tests/stages/test_training.py",
    "tests/stages/test_lora.py",
    "tests/stages/test_trackers.py",
    "tests/stages/test_real_files.py",
    "tests/stages/test_hub.py",
    "tests/fuzz/test_fuzz.py",
    "tests/pipeline/test_staleness.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(LONG)))


def pytest_unconfigure() -> None:
    loaded_python.stop()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder in which every stage has run. Read only."""
    folder = new_project(tmp_path_factory.mktemp("tiny"))
    for stage in stage_names():
        call(folder, stage)
    return folder


@pytest.fixture
def copy_of_tiny(tiny: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy of the tiny project, without its training state."""

    def copy(name: str = "project") -> Path:
        return Path(shutil.copytree(tiny, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns(".scratch")))

    return copy
