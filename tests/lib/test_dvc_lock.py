"""A dvc.lock that DVC was killed in is cut back to its whole records; no other one is touched."""

import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.lib.dvc_lock import HEAD, cut_back
from tests.real_files import PROJECT

CONTENT = (PROJECT / "dvc.lock").read_bytes()
BUFFER = 8192  # what Python writes at a time, of text that it encodes


def stages_of(content: bytes) -> dict:
    return YAML(typ="safe", pure=True).load(content.decode())["stages"] if content else {}


STAGES = stages_of(CONTENT)


def ends() -> list[int]:
    """Where a kill may have cut it: after each buffer, at a record's beginning, in a record's first line."""
    second, last = (CONTENT.index(f"\n  {list(STAGES)[place]}:\n".encode()) + 1 for place in (1, -1))
    return [*range(BUFFER, len(CONTENT), BUFFER), second + 4, last, last + 5, len(CONTENT) - 1, len(CONTENT) - 40]


@pytest.mark.parametrize("end", ends())
def test_whole_records_stay(end: int) -> None:
    whole = cut_back(CONTENT[:end])
    kept = stages_of(whole)
    assert CONTENT.startswith(whole)
    assert kept == {name: STAGES[name] for name in list(STAGES)[: len(kept)]}
    begun = sum(f"\n  {name}:\n".encode() in CONTENT[:end] for name in STAGES)
    assert len(kept) in (begun - 1, begun)


@pytest.mark.parametrize("end", [0, 5, len(HEAD), len(HEAD) + 1, len(HEAD) + 300])
def test_nothing_stays_where_no_record_is_whole(end: int) -> None:
    assert cut_back(CONTENT[:end]) == b""


@pytest.mark.parametrize(
    "content",
    [
        CONTENT,
        CONTENT.replace(b"    deps:\n", b"<<<<<<< ours\n    deps:\n", 1),
        HEAD + b"  only:\n    cmd: x\n<<<<<<< ours\n    deps: []\n",
        CONTENT.replace(b"outs:\n", b"outs: x\n", 1),
        b"not a lock",
    ],
)
def test_what_was_not_cut_off_is_left_as_it_is(content: bytes) -> None:
    assert cut_back(content) == content


def mend(folder: Path) -> str:
    words = [sys.executable, "-m", "stages.mend_lock", "--lock", folder / "dvc.lock"]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_file_is_cut_once_and_said_to_be(tmp_path: Path) -> None:
    file = tmp_path / "dvc.lock"
    assert mend(tmp_path) == ""
    file.write_bytes(CONTENT[: 3 * BUFFER])
    assert "DVC was stopped while it wrote it; " in mend(tmp_path)
    assert file.read_bytes() == cut_back(CONTENT[: 3 * BUFFER])
    assert mend(tmp_path) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["dvc.lock"]
    file.write_bytes(b"")
    mend(tmp_path)
    assert not file.exists()
