"""When a checkpoint is due."""

import pytest

from stages.lib.runs import training_run


def test_saving_takes_a_small_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(training_run.time, "monotonic", lambda: now)
    pace = training_run.Pace(60.0)
    now = 159.0
    assert not pace.is_due()
    now = 160.0
    assert pace.is_due()
    with pace.saving():
        now = 190.0
    now = 250.0  # one long save may have been an accident
    assert pace.is_due()
    with pace.saving():
        now = 270.0
    now = 469.0  # 199 s after it; the shorter of the last two took 20 s
    assert not pace.is_due()
    now = 470.0
    assert pace.is_due()


def test_0_seconds_save_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(training_run.time, "monotonic", lambda: now)
    pace = training_run.Pace(0.0)
    with pace.saving():
        now = 30.0
    assert pace.is_due()
