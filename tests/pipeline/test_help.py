"""--help of every script answers at once: it does not load torch."""

import subprocess
import sys

import pytest

from tests.pipeline.closure import ROOT

SCRIPTS = sorted(path.stem for path in (ROOT / "stages").glob("*.py") if "run(main)" in path.read_text())
HEAVY = ("torch", "transformers", "datasets")
CODE = """
import runpy, sys
sys.argv = ["stage", "--help"]
try:
    runpy.run_module("stages.{script}", run_name="__main__")
finally:
    print("LOADED", [name for name in {heavy} if name in sys.modules])
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_comes_without_loading_torch(script: str) -> None:
    code = CODE.format(script=script, heavy=HEAVY)
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "Usage: " in ended.stdout
    assert "LOADED []" in ended.stdout


def test_all_scripts_are_looked_at() -> None:
    assert set(SCRIPTS) == {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"}
