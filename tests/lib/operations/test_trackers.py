"""Trackers: no step twice after a resumption, and no failure of theirs that stops a run."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from stages.lib.command.errors import StoppedError
from stages.lib.command.strict_yaml import load_yaml
from stages.lib.operations.tensorboard_tracker import flat_settings
from stages.lib.operations.tracker import ShownReply
from stages.lib.operations.trackers import Trackers
from stages.lib.settings.runtime import Runtime, read_runtime
from tests.real_files import PROJECT
from tests.tracked_values import tensorboard_scalars, tensorboard_texts, wandb_rows

SETTINGS = {"train_sft": {"precision": "fp32"}, "seed": 0}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a test is the project."""
    monkeypatch.chdir(tmp_path)


def runtime(folder: Path, **values: object) -> Runtime:
    document = load_yaml(PROJECT / "runtime.yaml")["default"] | {"tracker_folder": str(folder / "runs")} | values
    path = folder / "runtime.yaml"
    path.write_text(json.dumps({"default": document}))
    return read_runtime("train_sft", path)


def attempt(folder: Path, steps: range, identity: str = "0a1b2c3d", **values: object) -> Trackers:
    """A run of the stage, or what a kill lets it do of one: `steps` with loss 1 / step."""
    if list(folder.glob("runs/tensorboard/*")):
        time.sleep(1.0)  # TensorBoard reads files in the order of their names, which begin with the second
    trackers = Trackers("train_sft", SETTINGS, runtime(folder, **values), identity)
    trackers.start(steps.start, lambda: [(step, {"loss": 1 / step}) for step in range(1, steps.start)])
    for step in steps:
        trackers.log(step, {"loss": 1 / step})
    return trackers


def tensorboard_losses(folder: Path) -> dict[str, list[tuple[int, float]]]:
    return {run.name: tensorboard_scalars(run)["loss"] for run in sorted((folder / "runs/tensorboard").iterdir())}


def test_a_resumed_run_has_no_step_twice_and_none_lost(tmp_path: Path) -> None:
    tensorboard = {"trackers": ["tensorboard"], "tracker_run": "trial"}
    attempt(tmp_path, range(1, 8), **tensorboard).close(1)
    attempt(tmp_path, range(5, 10), **tensorboard).close(0)
    losses = tensorboard_losses(tmp_path)
    assert losses == {"train_sft-trial-0a1b2c3d": [(step, pytest.approx(1 / step)) for step in range(1, 10)]}


def test_a_run_that_starts_anew_shows_nothing_of_the_one_before(tmp_path: Path) -> None:
    tensorboard = {"trackers": ["tensorboard"], "tracker_run": "trial"}
    attempt(tmp_path, range(1, 8), **tensorboard).close(1)
    attempt(tmp_path, range(1, 3), **tensorboard).close(0)
    assert tensorboard_losses(tmp_path) == {"train_sft-trial-0a1b2c3d": [(1, 1.0), (2, 0.5)]}


def test_runs_of_one_label_are_told_apart_by_what_they_are(tmp_path: Path) -> None:
    tensorboard = {"trackers": ["tensorboard"], "tracker_run": "trial"}
    attempt(tmp_path, range(1, 4), **tensorboard).close(0)
    attempt(tmp_path, range(1, 3), "other", **tensorboard).close(1)
    attempt(tmp_path, range(3, 5), "other", **tensorboard).close(0)
    assert {name: [step for step, _ in losses] for name, losses in tensorboard_losses(tmp_path).items()} == {
        "train_sft-trial-0a1b2c3d": [1, 2, 3],
        "train_sft-trial-other": [1, 2, 3, 4],
    }


def test_a_run_in_a_copy_of_the_project_is_tracked_in_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "copy").mkdir()
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    attempt(tmp_path, range(1, 3), trackers=["tensorboard"], tracker_folder="runs").close(0)
    assert list(tmp_path.glob("runs/tensorboard/*/events*"))
    assert not (tmp_path / "copy/runs").exists()


def test_a_tracker_that_is_named_late_gets_the_rows_before(tmp_path: Path) -> None:
    attempt(tmp_path, range(3, 5), trackers=["tensorboard"]).close(0)
    assert tensorboard_losses(tmp_path) == {
        "train_sft-0a1b2c3d": [(step, pytest.approx(1 / step)) for step in range(1, 5)]
    }


def test_a_row_that_was_logged_is_in_the_file_when_the_process_is_killed(tmp_path: Path) -> None:
    in_own_process(tmp_path, "attempt(folder, range(1, 8), trackers=['tensorboard'])\nos.kill(os.getpid(), 9)")
    ((name, losses),) = tensorboard_losses(tmp_path).items()
    assert (name, [step for step, _ in losses]) == ("train_sft-0a1b2c3d", [*range(1, 8)])


def test_final_metrics_of_a_run_with_no_steps_left_are_tracked(tmp_path: Path) -> None:
    attempt(tmp_path, range(1, 4), trackers=["tensorboard"]).close(1)
    last = attempt(tmp_path, range(4, 4), trackers=["tensorboard"])
    last.add_results({"eval_loss": 0.25})
    last.close(0)
    (run,) = (tmp_path / "runs/tensorboard").iterdir()
    assert tensorboard_scalars(run)["final/eval_loss"] == [(3, 0.25)]
    assert [step for step, _ in tensorboard_scalars(run)["loss"]] == [1, 2, 3]


REPLIES = [ShownReply("a *prompt*\n", "and\n<b>its</b> reply"), ShownReply("another", "")]


def test_replies_are_quoted_text_of_their_step(tmp_path: Path) -> None:
    trackers = attempt(tmp_path, range(1, 4), trackers=["tensorboard"])
    trackers.log_replies(4, REPLIES)
    trackers.log(4, {"loss": 0.25})
    trackers.close(0)
    (run,) = (tmp_path / "runs/tensorboard").iterdir()
    assert tensorboard_texts(run) == {
        "replies/1": [(4, "    a *prompt*\n    \n    ---\n    and\n    <b>its</b> reply")],
        "replies/2": [(4, "    another\n    ---")],
    }


@pytest.mark.slow
def test_replies_are_a_table_in_the_row_of_their_step(tmp_path: Path) -> None:
    code = f"""
trackers = attempt(folder, range(1, 4), trackers=["wandb"])
from stages.lib.operations.tracker import ShownReply
trackers.log_replies(4, {REPLIES})
trackers.log(4, {{"loss": 0.25}})
trackers.close(0)
"""
    done = in_own_process(tmp_path, code)
    assert (done.returncode, done.stderr) == (0, "")
    (file,) = (tmp_path / "runs/wandb").glob("offline-run-*/*.wandb")
    rows = wandb_rows(file)
    assert [step for step, _ in rows] == [1, 2, 3, 4]
    assert rows[3][1]["loss"] == 0.25
    (table,) = (file.parent / "files/media/table").glob("replies_4_*.table.json")
    assert json.loads(table.read_text())["data"] == [list(reply) for reply in REPLIES]


def test_none_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    attempt(tmp_path, range(1, 4), trackers=["wandb"], wandb_mode="disabled").close(0)
    attempt(tmp_path, range(1, 4), trackers=[]).close(0)
    assert not (tmp_path / "runs").exists()
    assert capsys.readouterr() == ("", "")


def test_settings_become_one_level_of_keys() -> None:
    settings = {"train_sft": {"keep": "last", "optimizer": {"beta1": 0.9}, "limit": None, "sizes": [1, 2]}, "seed": 3}
    assert flat_settings(settings) == {
        "train_sft.keep": "last",
        "train_sft.optimizer.beta1": 0.9,
        "train_sft.limit": "null",
        "train_sft.sizes": "[1, 2]",
        "seed": 3,
    }


def failures(capsys: pytest.CaptureFixture) -> list[str]:
    """The lines on stderr, all of which must be warnings."""
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: tracking ") for line in lines), lines
    return lines


def test_a_folder_that_goes_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trackers = attempt(tmp_path, range(1, 3), trackers=["tensorboard"])
    (tmp_path / "runs").rename(tmp_path / "moved")
    (tmp_path / "runs").write_text("in the way")
    for step in range(3, 6):
        trackers.log(step, {"loss": 1.0})
    trackers.close(0)
    (line,) = failures(capsys)
    assert re.search(r"tensorboard failed, the run goes on without it: (FileNotFound|NotADirectory)Error", line)


def test_a_package_that_is_missing_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    attempt(tmp_path, range(1, 6), trackers=["tensorboard"]).close(0)
    (line,) = failures(capsys)
    assert "ModuleNotFoundError" in line


class Stuck:
    """A tracker whose server never answers."""

    def __init__(self) -> None:
        self.free = threading.Event()

    def log(self, _step: int, _values: Mapping[str, float]) -> None: ...

    def finish(self, _results: Mapping[str, float], _exit_code: int) -> None:
        self.free.wait()
        raise OSError("too late to matter")


class StuckTrackers(Trackers):
    def _tracker(self, *_: object) -> Stuck:
        return Stuck()


def stuck_trackers(folder: Path) -> StuckTrackers:
    trackers = StuckTrackers("train_sft", SETTINGS, runtime(folder, trackers=["wandb"]), "0a1b2c3d")
    trackers.start(1, list)
    trackers.log(1, {"loss": 1.0})
    return trackers


@pytest.fixture
def abandoned(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Has an item once wandb was given up."""
    calls: list[bool] = []
    monkeypatch.setattr("stages.lib.operations.trackers.abandon_wandb", lambda: calls.append(True))
    return calls


def test_a_tracker_that_hangs_is_left_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, abandoned: list[bool]
) -> None:
    monkeypatch.setattr("stages.lib.operations.trackers.SECONDS_TO_UPLOAD", 0.2)
    trackers = stuck_trackers(tmp_path)
    tracker = trackers.open["wandb"]
    started = time.monotonic()
    trackers.close(0)
    assert time.monotonic() - started < 2
    assert abandoned == [True]
    tracker.free.set()
    (line,) = failures(capsys)
    assert "it was not done in time" in line


def test_a_tracker_that_does_not_start_is_left_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, abandoned: list[bool]
) -> None:
    monkeypatch.setattr("stages.lib.operations.trackers.SECONDS_TO_START", 0.2)
    monkeypatch.setattr(StuckTrackers, "_tracker", lambda *_: threading.Event().wait())
    stuck_trackers(tmp_path).close(0)
    assert abandoned == [True]
    (line,) = failures(capsys)
    assert "it was not done in time" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cuts_the_last_upload_short(
    tmp_path: Path, capsys: pytest.CaptureFixture, number: int, abandoned: list[bool]
) -> None:
    """As `stages.lib.command.run.run` sets it up: the result is in place, so the stage still ends well."""

    def stop(number: int, _frame: object) -> None:
        raise StoppedError(number)

    trackers = stuck_trackers(tmp_path)
    before = signal.signal(number, stop)
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    started = time.monotonic()
    trackers.close(0)
    signal.signal(number, before)
    assert 0.2 < time.monotonic() - started < 5
    assert abandoned == [True]
    assert "it was not done in time" in "".join(failures(capsys))


def test_a_stopped_run_gives_its_trackers_their_seconds(tmp_path: Path) -> None:
    code = """
import signal
from stages.lib.command import run as command
from stages.lib.operations import stop_watch
from stages.lib.operations import trackers
from tests.lib.operations.test_trackers import stuck_trackers
sys.argv = ["stage"]
trackers.SECONDS_TO_STOP = 1.5
def main():
    stop_watch.STOP_WATCH._allowed = 0.3
    try:
        run = stuck_trackers(folder)
        signal.raise_signal(signal.SIGTERM)
    finally:
        run.close(143)
command.run(main)
"""
    done = in_own_process(tmp_path, code)
    assert done.returncode == 143
    assert "it was not done in time" in done.stderr
    assert "no place to save was reached" not in done.stderr


def in_own_process(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in which `attempt` and `folder` are known: what wandb leaves in a process must not meet other tests."""
    start = "import os, sys, time; from pathlib import Path; from tests.lib.operations.test_trackers import attempt\n"
    return subprocess.run(
        [sys.executable, "-c", f"{start}folder = Path(sys.argv[1])\n{code}", folder],
        env={**os.environ, "PYTHONPATH": str(PROJECT), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_an_offline_run_of_wandb_that_was_killed_is_whole_in_one_folder(tmp_path: Path) -> None:
    values = "trackers=['wandb'], tracker_run='trial'"
    wait = "while not list(folder.glob('runs/wandb/offline-run-*/*.wandb')): time.sleep(0.01)"
    # wandb writes a run's first rows to its file after 15 seconds, so this kill loses all of them.
    in_own_process(tmp_path, f"attempt(folder, range(1, 8), {values})\n{wait}\nos.kill(os.getpid(), 9)")
    (before,) = tmp_path.glob("runs/wandb/offline-run-*")
    done = in_own_process(tmp_path, f"attempt(folder, range(5, 10), {values}).close(0)", WANDB_MODE="online")
    assert (done.returncode, done.stderr) == (0, "")
    (after,) = tmp_path.glob("runs/wandb/offline-run-*")
    assert after != before
    (file,) = after.glob("*.wandb")
    assert wandb_rows(file) == [(step, {"loss": 1 / step}) for step in range(1, 10)]
    run_id = before.name.split("-", 3)[3]
    assert run_id == "train_sft-trial-0a1b2c3d"
    assert run_id in after.name  # which ends in a number if both were begun in one second


@pytest.mark.slow
def test_a_crash_of_wandb_is_told_once(tmp_path: Path) -> None:
    code = """
trackers = attempt(folder, range(1, 3), trackers=["wandb"])
while not list(folder.glob("runs/wandb/offline-run-*/*.wandb")):
    time.sleep(0.01)
time.sleep(2)
import wandb
os.kill(wandb.setup().assert_service()._proc._process.pid, 9)
for step in range(3, 6):
    time.sleep(0.2)
    trackers.log(step, {"loss": 1.0})
trackers.close(0)
"""
    done = in_own_process(tmp_path, code)
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: tracking with wandb failed, the run goes on without it: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "reason"), [("", "no API key: run `wandb login`"), ("a" * 40, "Failed to authenticate")]
)
def test_a_server_out_of_reach_is_told_once_and_soon(tmp_path: Path, key: str, reason: str) -> None:
    code = "attempt(folder, range(1, 6), trackers=['wandb'], wandb_mode='online').close(143)"
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    environment["WANDB_MODE"] = "offline"  # which runtime.yaml overrules
    started = time.monotonic()
    done = in_own_process(tmp_path, code, WANDB_API_KEY=key, **environment)
    assert time.monotonic() - started < 30
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: tracking with wandb failed, the run goes on without it: ")
    assert reason in line
