"""A signal is noted, agreed on and obeyed; work that does not look in time is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.lib.compute.processes import Processes
from stages.lib.operations.stop_signal import StopSignal
from tests.tiny_models import CPU

ALONE = Processes(0, 1, CPU)


def work(number: signal.Signals) -> None:
    with StopSignal("train_rm", ALONE, 20.0) as stop:
        assert not stop.agreed()
        signal.raise_signal(number)
        assert stop.agreed()
        stop.leave("state saved at step 3")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_obeyed_where_it_suits(number: signal.Signals, capsys: pytest.CaptureFixture) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        work(number)
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err == f"train_rm: stopped by {number.name}; state saved at step 3\n"
    assert signal.getsignal(number) is before


def test_a_signal_after_the_last_look_is_passed_on() -> None:
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with StopSignal("train_rm", ALONE, 20.0):
            signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


BLOCKED = """
import ctypes, time
import torch
from stages.lib.command.run import run
from stages.lib.compute.processes import Processes
from stages.lib.operations.stop_signal import StopSignal

def main() -> None:
    with StopSignal("train_ppo", Processes(0, 1, torch.device("cpu")), 0.5) as stop:
        if SAVES:
            with stop.saving():
                print("in", flush=True)
                time.sleep(1.5)
        else:
            print("in", flush=True)
            while True:
                ctypes.CDLL(None).sleep(60)  # as a collective that waits for ever: Python gets to no handler
        stop.agreed() and stop.leave("state saved at step 3")

run(main)
"""


@pytest.mark.parametrize(
    ("saves", "line"),
    [
        (False, "stopped by SIGTERM; no place to save was reached, what was saved before stands\n"),
        (True, "train_ppo: stopped by SIGTERM; state saved at step 3\n"),
    ],
)
def test_work_that_does_not_look_is_left_in_time_and_a_save_is_not(tmp_path: Path, saves: bool, line: str) -> None:
    (tmp_path / "script.py").write_text(BLOCKED.replace("SAVES", str(saves)))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        env={**os.environ, "PYTHONPATH": "."},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    _, errors = process.communicate()
    assert (process.returncode, errors) == (128 + signal.SIGTERM, line)
    assert 0.4 < time.monotonic() - asked < 10
