"""The log of runs: what a record holds, and which record belongs to outs of given hashes."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from stages.lib.operations.run_log import launcher_in_use, log_run, read_runs, run_that_made
from stages.lib.settings.declaration import plain
from stages.lib.settings.runtime import Runtime, read_runtime


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STAGEWISE_SCRATCH", str(tmp_path / "scratch"))
    for name in ("LAUNCH", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "scratch"


def test_a_record_says_how_a_stage_ran_and_what_it_wrote(scratch: Path) -> None:
    runtime: Runtime = read_runtime("train_rm")
    started = {"processes": 2, "device": "cuda:0", "launcher": "torchrun"}
    log_run("train_rm", {"models/rm": "ab.dir"}, 1.26, runtime=plain(runtime), **started)
    (record,) = (json.loads(line) for line in (scratch / "runs.jsonl").read_text().splitlines())
    assert record == read_runs()[0]
    assert (record["stage"], record["outs"], record["seconds"]) == ("train_rm", {"models/rm": "ab.dir"}, 1.3)
    assert {name: record[name] for name in started} == started
    assert record["runtime"]["micro_batch_tokens"] == runtime.micro_batch_tokens
    assert 10 < record["peak_memory_mib"] < 100_000
    assert record["versions"]["dvc"] == version("dvc")


@pytest.mark.usefixtures("scratch")
def test_only_libraries_that_the_process_has_loaded_are_named() -> None:
    code = "from stages.lib.operations.run_log import log_run; import numpy; log_run('report', {'a': 'b'}, 0.0)"
    subprocess.run([sys.executable, "-c", code], check=True)
    (record,) = read_runs()
    assert record["versions"] == {"dvc": version("dvc"), "numpy": version("numpy")}
    assert record["runtime"] is None


@pytest.mark.usefixtures("scratch")
def test_the_launcher_is_the_variables_or_plain_python_or_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher_in_use() == "python -m"
    monkeypatch.setenv("RANK", "0")
    assert launcher_in_use() == "not known: $LAUNCH is not set"
    monkeypatch.setenv("LAUNCH", "torchrun --standalone -m")
    assert launcher_in_use() == "torchrun --standalone -m"


def test_the_newest_run_with_all_hashes_is_the_one_that_made_them(scratch: Path) -> None:
    for seconds, outs in enumerate([{"a": "1", "b": "2"}, {"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1"}]):
        log_run("train_rm", outs, float(seconds))
    with (scratch / "runs.jsonl").open("a") as file:
        file.write('{"stage": "old", "seconds": 1}\n[1]\n{"stage": "cut o')
    runs = read_runs()
    assert len(runs) == 4
    assert run_that_made({"a": "1", "b": "2"}, runs)["seconds"] == 1.0
    assert run_that_made({"b": "3"}, runs)["seconds"] == 2.0
    assert run_that_made({"a": "1", "b": "4"}, runs) is None
    assert run_that_made({}, runs) is None


def test_a_log_that_cannot_be_written_is_a_warning(scratch: Path, capsys: pytest.CaptureFixture) -> None:
    scratch.write_text("a file where a folder should be\n")
    log_run("report", {"a": "1"}, 0.0)
    assert "warning: report is done, but its run could not be logged" in capsys.readouterr().err


@pytest.mark.usefixtures("scratch")
def test_no_log_is_no_runs() -> None:
    assert read_runs() == []
