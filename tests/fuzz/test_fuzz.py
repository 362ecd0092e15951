"""The short form of the fuzz program: some of its cases, the same at every run. `make fuzz` runs all."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz.areas.all import AREAS
from tests.fuzz.case import Case, nothing, put
from tests.fuzz.child import Ended
from tests.fuzz.judge import FAULTS, verdict
from tests.fuzz.run import chosen
from tests.loaded_python import loaded_python
from tests.stages.tiny_pipeline import PROJECT

CASES = 40  # about one minute of one core, with the project that they start from
TRACEBACK = (
    'Traceback (most recent call last):\n  File "/x/stages/lib/command/jsonl.py", line 5, in f\nValueError: no\n'
)


@pytest.mark.slow
def test_stages_refuse_what_is_wrong_with_one_line(tmp_path: Path) -> None:
    command = [*loaded_python(), "-m", "tests.fuzz.run", "--short", f"--cases={CASES}", "--jobs=1"]
    command.append(f"--lists={tmp_path}")
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    findings = tmp_path / "findings.md"
    assert findings.is_file(), done.stdout + done.stderr
    assert findings.read_text() == ""
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    counts = Counter((result["area"], result["kind"] in FAULTS) for result in results)
    assert {area for area, _ in counts} == set(AREAS)
    assert len(results) >= CASES - len(AREAS)


@pytest.mark.parametrize(
    ("status", "stderr", "kind"),
    [
        (0, "", "accepted"),
        (0, "warning: of something\n", "accepted"),
        (2, "error: params.yaml: seed must be a whole number\n", "refused"),
        (2, "warning: of something\nerror: params.yaml: seed must be a whole number\n", "refused"),
        (2, "error: one\nerror: two\n", "lines"),
        (2, "error: one\nmore of it\n", "lines"),
        (2, "Loading: 100%\nerror: one\n", "lines"),
        (2, "error: a\x1b[2Jb\n", "lines"),
        (2, f"error: {'x' * 2000}\n", "lines"),
        (2, "", "lines"),
        (1, TRACEBACK, "traceback"),
        (2, TRACEBACK, "traceback"),
        (1, "Killed\n", "exit"),
        (-11, "", "exit"),
        (None, "", "hang"),
    ],
)
def test_verdict_on_how_a_stage_ended(tmp_path: Path, status: int | None, stderr: str, kind: str) -> None:
    case = Case("any", nothing, ("train_sft",))
    ended = Ended("train_sft", status, "", stderr, 1.0)
    assert verdict(case, tmp_path, [ended], [], may_run_on=False).kind == kind


def test_verdict_on_what_a_stage_left(tmp_path: Path) -> None:
    case = Case("any", nothing, ("train_sft",))
    refused = [Ended("train_sft", 2, "", "error: no\n", 1.0)]
    accepted = [Ended("train_sft", 0, "", "", 1.0)]
    put(tmp_path / "models/sft/config.json", "{}")
    assert verdict(case, tmp_path, refused, ["models/sft"], may_run_on=False).kind == "left"
    assert verdict(case, tmp_path, accepted, ["models/sft"], may_run_on=False).kind == "accepted"
    put(tmp_path / "models/.sft.partial", "half")
    assert verdict(case, tmp_path, accepted, ["models/sft"], may_run_on=False).kind == "left"


def test_verdict_on_what_was_expected(tmp_path: Path) -> None:
    refused = [Ended("train_sft", 2, "", "error: no\n", 1.0)]
    accepted = [Ended("train_sft", 0, "", "", 1.0)]
    for runs, expected in ((refused, "accepted"), (accepted, "refused")):
        case = Case("any", nothing, ("train_sft",), expected)
        assert verdict(case, tmp_path, runs, [], may_run_on=False).kind == "unexpected"
    (tmp_path / "pwned").touch()
    assert verdict(Case("any", nothing, ()), tmp_path, refused, [], may_run_on=False).kind == "unexpected"


def test_settings_that_ask_for_much_work_are_no_hang(tmp_path: Path) -> None:
    ended = [Ended("train_sft", None, "train_sft  5/99999999  loss 1\n", "", 8.0)]
    case = Case("any", nothing, ("train_sft",))
    assert verdict(case, tmp_path, ended, [], may_run_on=True).kind == "accepted"
    assert verdict(case, tmp_path, ended, [], may_run_on=False).kind == "hang"


def test_cases_are_known_by_area_number_and_seed() -> None:
    for name, area in AREAS.items():
        listed = len(area.named) + len(area.systematic)
        first, again, other = (area.case(name, listed + 3, seed).what for seed in (1, 1, 2))
        assert first == again
        assert area.case(name, 0, 1).what == area.case(name, 0, 2).what
        assert first != other or area.case(name, listed + 4, 1).what != area.case(name, listed + 4, 2).what


def test_a_long_run_has_all_that_are_listed_and_at_least_3000_cases() -> None:
    names = list(AREAS)
    cases = Counter(name for name, _ in chosen(3600, 1, names, short=False))
    assert cases.total() >= 3000
    assert all(cases[name] >= len(area.named) + len(area.systematic) for name, area in AREAS.items())


def test_permissions_hold_back_a_stage_of_root(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "kept").write_text("x")
    (tmp_path / "kept").chmod(0)
    tried = "from tests.fuzz.child import obey_permissions as o; o(); import os, sys, subprocess as s; f = sys.argv[1]"
    tried += "; assert not os.access(f + '/kept', os.R_OK) and not os.access(f + '/closed', os.W_OK)"
    tried += "; assert s.run(['cat', f + '/kept'], capture_output=True).returncode == 1"
    done = subprocess.run(
        [sys.executable, "-c", tried, tmp_path], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
