"""The tiny pipeline, made once a session; tests copy it before they change it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pipeline.graph import stage_names
from tests.stages.tiny_pipeline import call, new_project


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
