"""The hash of a stage's code: it covers what is imported late, and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.closure import code_files
from tests.real_files import PROJECT

PRINT_FILES = """
import importlib, sys
importlib.import_module(sys.argv[1])
from stages.lib import own_code
print(*(file.relative_to(own_code.PROJECT) for file in own_code.code_files()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train_ppo", "evaluate_policy"])
def test_it_is_the_code_of_the_stages_deps(stage: str) -> None:
    words = [sys.executable, "-c", PRINT_FILES, f"stages.{stage}"]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=True)
    files = {file for file in done.stdout.split() if Path(file).name != "__init__.py"}
    declared = {file for file in code_files(f"stages/{stage}.py") if file.endswith(".py")}
    assert files == declared
    assert "stages/lib/deepspeed_engine.py" in files  # imported in a function, once an engine is made
