"""The curve, and what a log shows of a run."""

from pathlib import Path

import pytest

from stages.lib.operations import progress
from stages.lib.operations.progress import Progress
from stages.lib.runs.curve import Curve


def test_a_curve_has_a_row_a_step_and_gaps_where_nothing_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "curve.csv"
    curve = Curve(path, ("loss", "eval/loss"))
    curve.append(1, {"loss": 1 / 3})
    Curve(path, ("loss", "eval/loss")).append(2, {"eval/loss": 2e-9, "loss": 12345678.0})
    assert path.read_text() == "step,loss,eval/loss\n1,0.3333333,\n2,1.234568e+07,2e-09\n"


def test_a_metric_that_is_no_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="lss"):
        Curve(tmp_path / "curve.csv", ("loss",)).append(1, {"lss": 1.0})


def test_a_log_gets_a_line_every_so_often(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = Progress("train_rm", 10, 5.0)
    for step in range(1, 11):
        clock[0] += 2.0
        shown.update(step, 400, {"loss": 0.5})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train_rm  1/10  loss 0.5  200 tokens/s  0:18 left"
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "7/10", "10/10"]
    assert lines[-1] == "train_rm  10/10  loss 0.5  200 tokens/s  0:00 left"


def test_time_left_of_a_resumed_run_counts_from_where_it_resumed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = Progress("train_rm", 100, 0.0, first=90)
    clock[0] = 10.0
    shown.update(91, 50, {})
    assert "5 tokens/s  1:30 left" in capsys.readouterr().out
