"""A user's mistake is one message on stderr and exit code 2; a bug keeps its traceback."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from stages.lib import errors

SCRIPT = """
from stages.lib.errors import PathOption, StageError, run

def main(rows: PathOption) -> None:
    if rows.name == "bug":
        raise KeyError("a bug")
    raise StageError(f"{rows} is empty")

run(main)
"""


def start(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    (tmp_path / "script.py").write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), *options],
        env={**os.environ, "PYTHONPATH": ":".join(["."]), "TMPDIR": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    ended = start(tmp_path, "--rows", "x.jsonl")
    assert (ended.returncode, ended.stderr, ended.stdout) == (2, "error: x.jsonl is empty\n", "")


def test_a_bug_shows_where_it_is(tmp_path: Path) -> None:
    ended = start(tmp_path, "--rows", "bug")
    assert ended.returncode == 1
    assert "KeyError" in ended.stderr


def test_an_option_that_is_missing_is_named(tmp_path: Path) -> None:
    ended = start(tmp_path)
    assert ended.returncode == 2
    assert "--rows" in ended.stderr


def test_of_the_processes_of_one_launch_one_speaks(tmp_path: Path) -> None:
    launch = {"TORCHELASTIC_RUN_ID": "a", "MASTER_PORT": "1"}
    ended = [start(tmp_path, "--rows", "x", RANK=str(rank), **launch) for rank in (1, 0)]
    assert [process.returncode for process in ended] == [2, 2]
    assert [process.stderr for process in ended] == ["error: x is empty\n", ""]


def test_a_later_launch_with_the_same_process_id_speaks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    speaks = []
    for started_at in ("100", "100", "200"):
        monkeypatch.setattr(errors, "_start_time", lambda _process_id, time=started_at: time)
        speaks.append(errors._speaks_for_all_processes())
    assert speaks == [True, False, True]
