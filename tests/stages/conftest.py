"""The tiny pipeline, made once a session; tests copy it before they change it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.stages.tiny_pipeline import call, new_project

STAGES = (
    "code_manifest",
    "prepare_data",
    "prepare_base",
    "tokenize_data@sft",
    "tokenize_data@preference",
    "tokenize_data@prompts",
    "train_sft",
    "train_rm",
    "ref_logprobs",
    "train_dpo",
    "train_ppo",
    "train_grpo",
    "evaluate@sft",
    "evaluate@dpo",
    "evaluate@ppo",
    "evaluate@grpo",
    "report",
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder in which every stage has run. Read only."""
    folder = new_project(tmp_path_factory.mktemp("tiny"))
    for stage in STAGES:
        call(folder, stage)
    return folder


@pytest.fixture
def copy_of_tiny(tiny: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy of the tiny project, without its training state."""

    def copy(name: str = "project") -> Path:
        return Path(shutil.copytree(tiny, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns(".scratch")))

    return copy
