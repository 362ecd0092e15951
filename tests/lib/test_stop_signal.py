"""A signal is noted, agreed on and obeyed; work that does not look in time is left."""

import signal
import subprocess
import sys
import time

import pytest

from stages.lib.processes import Processes
from stages.lib.stop_signal import StopSignal
from tests.tiny_models import CPU

ALONE = Processes(0, 1, CPU)


def work(number: signal.Signals) -> None:
    with StopSignal("train_rm", ALONE) as stop:
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
    assert capsys.readouterr().out == f"\ntrain_rm: stopped by {number.name}; state saved at step 3\n"
    assert signal.getsignal(number) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_signal_after_the_last_look_is_passed_on() -> None:
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with StopSignal("train_rm", ALONE):
            signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_save_may_take_its_time() -> None:
    old_handler = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with StopSignal("train_rm", ALONE) as stop:
            with stop.saving():
                signal.raise_signal(signal.SIGTERM)
                assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
            assert stop.agreed()
    finally:
        signal.signal(signal.SIGTERM, old_handler)


def test_work_that_does_not_look_is_left_before_a_launcher_kills_it() -> None:
    code = (
        "import stages.lib.stop_signal as s, time, torch; from stages.lib.processes import Processes\n"
        "s.GRACE_SECONDS = 0.5\n"
        "with s.StopSignal('train_ppo', Processes(0, 1, torch.device('cpu'))): print('in', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert 0.4 < time.monotonic() - asked < 10
    assert output.startswith("\ntrain_ppo: stopped by SIGTERM; within 0 s no place to save was reached")
