"""A dvc.lock that DVC was killed in gets its records back; no other one is touched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from ruamel.yaml import YAML

from stages.tools.dvc_lock import HEAD, SCHEMA, is_cut_off, mended, records
from tests.real_files import PROJECT

CONTENT = (PROJECT / "dvc.lock").read_bytes()
NAMES = list(records(CONTENT))
BUFFER = 8192  # what Python writes at a time, of text that it encodes
SECOND, LAST = (CONTENT.index(b"\n  " + NAMES[place] + b"\n") + 1 for place in (1, -1))
# After each buffer, unless that is where a line ends, which no one can tell from a whole file; at the beginning of a
# record, in and after its first line; near the end.
BUFFERS = [end for end in range(BUFFER, len(CONTENT), BUFFER) if not CONTENT[:end].endswith(b"\n")]
ENDS = [*BUFFERS, SECOND + 4, SECOND + 3 + len(NAMES[1]), LAST + 5]
ENDS += [len(CONTENT) - 1, len(CONTENT) - 40]


def stages_of(content: bytes) -> dict:
    document = YAML(typ="safe", pure=True).load(content.decode())
    COMPILED_LOCKFILE_SCHEMA(document)
    return document["stages"]


STAGES = stages_of(CONTENT)


def test_each_record_is_found() -> None:
    assert [name.decode()[:-1] for name in NAMES] == list(STAGES)
    assert HEAD + b"".join(records(CONTENT).values()) == CONTENT


@pytest.mark.parametrize("end", ENDS)
def test_whole_records_stay_and_none_is_half(end: int) -> None:
    assert is_cut_off(CONTENT[:end])
    whole = mended(CONTENT[:end], b"")
    kept = stages_of(whole) if whole else {}
    assert kept == {name: STAGES[name] for name in list(STAGES)[: len(kept)]}
    begun = sum(b"\n  " + name + b"\n" in CONTENT[:end] for name in NAMES)
    assert len(kept) == begun - 1


@pytest.mark.parametrize("end", [*ENDS, 0, 5, len(SCHEMA), len(HEAD), len(HEAD) + 1, len(HEAD) + 300])
def test_the_others_come_from_the_last_commit(end: int) -> None:
    assert is_cut_off(CONTENT[:end]) or end == len(SCHEMA)
    assert mended(CONTENT[:end], CONTENT) == CONTENT


def test_a_record_of_its_own_is_newer_than_the_committed_one() -> None:
    old = CONTENT.replace(b"md5: ", b"md5: 0")
    found = mended(CONTENT[: LAST + 100], old)
    assert found == CONTENT[:LAST] + old[old.index(b"\n  " + NAMES[-1]) + 1 :]


def test_nothing_is_taken_from_a_committed_file_that_is_cut_off() -> None:
    assert mended(CONTENT[: LAST + 100], CONTENT[:-3]) == CONTENT[:LAST]


@pytest.mark.parametrize("end", [0, 5, len(HEAD) + 1, len(HEAD) + 300])
def test_nothing_stays_where_there_is_no_whole_record(end: int) -> None:
    assert mended(CONTENT[:end], b"") == b""


ONE = HEAD + b"  only:\n    cmd: x\n"


@pytest.mark.parametrize(
    "content",
    [
        CONTENT,
        CONTENT.replace(b"\n", b"\r\n"),
        CONTENT + b"datasets:\n- name: a\n",
        CONTENT + b"    <<<: x\n",
        *(lock + b"<<<<<<< ours\n" for lock in (CONTENT, ONE)),
        *(lock + b">>>>>>> theirs" for lock in (CONTENT, ONE)),
        ONE.replace(b"x", b"\n    - x\n    - y"),
        ONE + b"    deps:\n    - path: https://a\n      etag: b\n",
        ONE + b"    outs: x\n",
        ONE + b"\t  outs: []\n",
        b"not a lock",
        b"train:\n  outs:\n  - path: of DVC 1",
    ],
)
def test_what_was_not_cut_off_is_not_taken_for_it(content: bytes) -> None:
    assert not is_cut_off(content)


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder, check=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with a lock of two stages, of which the last commit has the first."""
    (tmp_path / "dvc.lock").write_bytes(ONE)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "dvc.lock")
    git(tmp_path, "commit", "-qm", "one")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def mend(folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    words = [sys.executable, "-m", "stages.tools.mend_lock"]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_the_file_is_mended_once_and_said_to_be(project: Path) -> None:
    file = project / "dvc.lock"
    assert "cut off" not in mend(project)
    file.rename(project / "elsewhere")
    file.symlink_to("elsewhere")
    file.write_bytes(ONE.replace(b"only", b"other") + b"  only:\n    cm")
    assert "dvc.lock was cut off" in mend(project)
    assert file.is_symlink()
    assert list(stages_of(file.read_bytes())) == ["other", "only"]
    assert "cut off" not in mend(project)
    git(project, "rm", "-q", "--cached", "dvc.lock")
    git(project, "commit", "-qm", "two")
    file.write_bytes(b"")
    mend(project)
    assert not file.exists()


@pytest.mark.slow
def test_a_file_that_dvc_writes_at_this_moment_is_left_alone(project: Path) -> None:
    """DVC holds its lock meanwhile, and has the file open that would be replaced."""
    file = project / "dvc.lock"
    file.write_bytes(ONE[:-3])
    holder = "from dvc.repo import Repo\nwith Repo().lock:\n    print('held', flush=True)\n    input()\n"
    words = [sys.executable, "-c", holder]
    with subprocess.Popen(words, cwd=project, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert "cut off" not in mend(project)
        process.communicate("\n")
    assert file.read_bytes() == ONE[:-3]
    assert "dvc.lock was cut off" in mend(project)
    assert file.read_bytes() == ONE


@pytest.mark.slow
def test_a_lock_of_an_earlier_version_is_one_line_until_the_first_stage_has_run(project: Path) -> None:
    file = project / "dvc.lock"
    file.write_bytes(ONE)
    assert mend(project).splitlines() == [
        "note: dvc.lock is of an earlier version of stagewise, whose token tables, names and checkpoints this one does "
        "not read: every stage runs again"
    ]
    assert file.read_bytes() == ONE
    file.write_bytes(ONE.replace(b"only", b"code_manifest"))
    assert mend(project) == ""
