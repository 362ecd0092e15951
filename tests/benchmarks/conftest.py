"""A folder to run benchmarks in, and the random models that they load."""

import os
from pathlib import Path

import pytest

from benchmarks import random_models
from tests.pipeline.graph import ROOT
from tests.stages.tiny_pipeline import change


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings that a benchmark reads, with one thread: enough for a tiny model, and fast on a busy machine."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "runtime.yaml").write_bytes((ROOT / "runtime.yaml").read_bytes())
    change(folder / "runtime.yaml", {"default": {"threads": 1}})
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    random_models.main("tiny", "fp32", os.fspath(folder))
    return folder
