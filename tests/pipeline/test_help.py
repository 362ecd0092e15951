"""--help of every script answers at once: it does not load torch."""

import subprocess
import sys

import pytest

from tests.pipeline.graph import ROOT

FILES = [*(ROOT / "stages").glob("*.py"), *(ROOT / "stages/tools").glob("*.py")]
SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT / "stages").with_suffix("").parts)
    for path in FILES
    if "run(main)" in path.read_text()
)
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
    assert {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"} <= {*SCRIPTS}
    assert {"tools.show_lineage", "tools.use_profile", "tools.plot_curves"} <= {*SCRIPTS}
