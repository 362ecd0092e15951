"""The hash of a stage's code: it covers what is imported late, and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

from stages.lib import own_code
from tests.pipeline.closure import code_files, imported_files, parsed
from tests.real_files import PROJECT

PRINT_FILES = """
import importlib, sys
importlib.import_module(sys.argv[1])
from stages.lib import own_code
print(*(file.relative_to(own_code.PROJECT) for file in own_code.code_files()))
"""


def test_imports_are_found_as_the_parser_finds_them() -> None:
    files = sorted((PROJECT / "stages").rglob("*.py"))
    assert len(files) > 60
    for file in files:
        name = file.relative_to(PROJECT).as_posix()
        expected = {PROJECT / path for path in imported_files(parsed(file), name, PROJECT)}
        assert set(own_code._imported_files(file)) == expected, name


@pytest.mark.slow
def test_it_is_the_code_of_the_stages_deps() -> None:
    words = [sys.executable, "-c", PRINT_FILES, "stages.train_ppo"]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=True)
    files = {file for file in done.stdout.split() if Path(file).name != "__init__.py"}
    declared = {file for file in code_files("stages/train_ppo.py") if file.endswith(".py")}
    assert files == declared
    assert "stages/lib/deepspeed_engine.py" in files  # imported in a function, once an engine is made
