"""The contract of stages/lib/operations: no module of it can change a byte of an out."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.lib.operations.idle import ANSWERS, MODULES
from tests.loaded_python import loaded_python
from tests.real_files import PROJECT


@pytest.mark.slow
def test_the_outs_keep_their_bytes_without_any_module_of_operations(tmp_path: Path) -> None:
    done = subprocess.run(
        [*loaded_python(), "-m", "tests.lib.operations.idle", str(tmp_path)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "outs.json").read_text())
    as_it_is = found.pop("")
    assert {Path(out).name for out in as_it_is} >= {"model.safetensors", "sft.csv", "train.arrow"}
    assert found.keys() == {*MODULES}
    for module, outs in found.items():
        assert outs == as_it_is, module


def test_an_answer_is_given_for_modules_that_there_are() -> None:
    assert {*ANSWERS} <= {*MODULES}
