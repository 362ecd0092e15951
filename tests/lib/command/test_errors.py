"""A user's mistake is one message on stderr and exit code 2; a bug keeps its traceback."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from stages.lib.command import errors
from stages.lib.operations import last_words
from tests.real_files import PROJECT

SCRIPT = """
from stages.lib.command.run import PathOption, run
from stages.lib.command.errors import StageError

def main(rows: PathOption) -> None:
    if rows.name == "bug":
        raise KeyError("a bug")
    if rows.is_dir():
        rows.read_text()
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


def test_a_message_is_one_line_whatever_it_quotes(tmp_path: Path) -> None:
    ended = start(tmp_path, "--rows", "a\nb\r\x1b[31m\u2028c")
    assert ended.stderr == "error: a\\nb\\r\\x1b[31m\\u2028c is empty\n"


def test_a_long_message_loses_its_middle() -> None:
    line = errors.one_line("begins " + "x" * 5000 + " ends")
    assert len(line) < errors.LONGEST_MESSAGE + 10
    assert line.startswith("begins x")
    assert line.endswith("x ends")


def test_a_file_that_cannot_be_read_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    ended = start(tmp_path, "--rows", str(tmp_path))
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {tmp_path}: Is a directory; ")
    assert ended.stderr.count("\n") == 1


def test_a_bug_shows_where_it_is(tmp_path: Path) -> None:
    ended = start(tmp_path, "--rows", "bug")
    assert ended.returncode == 1
    assert "KeyError" in ended.stderr


def test_an_option_that_is_missing_is_named(tmp_path: Path) -> None:
    ended = start(tmp_path)
    assert (ended.returncode, ended.stderr) == (2, "error: Missing option '--rows'.\n")
    ended = start(tmp_path, "--row", "x")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: No such option: --row")
    assert ended.stderr.count("\n") == 1


def test_of_the_processes_of_one_launch_one_speaks(tmp_path: Path) -> None:
    launch = {"TORCHELASTIC_RUN_ID": "a", "MASTER_PORT": "1"}
    ended = [start(tmp_path, "--rows", "x", RANK=str(rank), WORLD_SIZE="2", **launch) for rank in (1, 0)]
    assert [process.returncode for process in ended] == [2, 2]
    assert [process.stderr for process in ended] == ["error: x is empty\n", ""]


def test_a_process_alone_speaks_each_time(tmp_path: Path) -> None:
    ended = [start(tmp_path, "--rows", "x", RANK="0", WORLD_SIZE="1") for _ in range(2)]
    assert [process.stderr for process in ended] == ["error: x is empty\n"] * 2


WAITING = """
import signal, time
from stages.lib.command.run import run

def main() -> None:
    try:
        print("in", flush=True)
        time.sleep(60)
    finally:
        print("tidied up", flush=True)

run(main)
"""


def test_a_signal_ends_a_stage_with_one_line_and_tidies_up(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(WAITING)
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py")],
            env={**os.environ, "PYTHONPATH": "."},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "in\n"
        process.send_signal(number)
        output, errors = process.communicate()
        assert (process.returncode, output, errors) == (128 + number, "tidied up\n", f"stopped by {number.name}\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_libraries_are_loaded_is_one_line(tmp_path: Path, number: signal.Signals) -> None:
    """The signal comes in the middle of the import of torch, whose place a file takes."""
    (tmp_path / "torch.py").write_text(f"import signal\nsignal.raise_signal({number.value})\n")
    done = subprocess.run(
        [sys.executable, "-m", "stages.train_sft"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", f"stopped by {number.name}\n")


def test_a_full_disk_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "from pathlib import Path\nfrom stages.lib.command.run import run\n"
        "def main() -> None:\n    with Path('/dev/full').open('w') as file:\n        file.write('x')\nrun(main)"
    )
    ended = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: no space left in ")
    assert len(ended.stderr.splitlines()) == 1


ENDS = """
import atexit, os
from pathlib import Path
from stages.lib.command.run import PathOption, run
from stages.lib.command.errors import StageError

class Held:
    def __del__(self):
        os.abort()  # as a thread of gloo that needs the interpreter while it is dismantled

held = Held()
atexit.register(print, "closed")

def main(rows: PathOption) -> None:
    if rows.name == "bad":
        raise StageError("bad rows")

run(main)
"""


@pytest.mark.parametrize(("rows", "status", "told"), [("good", 0, ""), ("bad", 2, "error: bad rows\n")])
def test_a_process_of_a_launch_ends_without_being_dismantled(rows: str, status: int, told: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(ENDS)
    environment = {**os.environ, "PYTHONPATH": ".", "TMPDIR": str(tmp_path), "RANK": "0"}
    command = [sys.executable, str(tmp_path / "script.py"), "--rows", rows]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr, ended.stdout) == (status, told, "closed\n")


def test_claims_of_launches_long_ago_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_words.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    for name, age in (("stagewise-error-old", 7200), ("stagewise-error-new", 60), ("another-old", 7200)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert last_words._speaks_for_all_processes()
    left = {path.name for path in tmp_path.iterdir()}
    assert left > {"another-old", "stagewise-error-new"}
    assert len(left) == 3  # and the claim of this launch


def test_a_later_launch_with_the_same_process_id_speaks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    speaks = []
    for started_at in ("100", "100", "200"):
        monkeypatch.setattr(last_words, "_start_time", lambda _process_id, time=started_at: time)
        speaks.append(last_words._speaks_for_all_processes())
    assert speaks == [True, False, True]
