"""Chunks that an earlier start has kept: taken as they are, or computed again with a warning."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from stages.lib.command.hashing import value_hash
from stages.lib.compute.processes import Processes
from stages.lib.runs.partial_results import NUMBER, NUMBERS, TOKEN_IDS, PartialResults
from stages.lib.settings.runtime import Runtime, read_runtime
from tests.tiny_models import CPU

COLUMNS = {"ids": TOKEN_IDS, "reward": NUMBER, "logps": NUMBERS}
VALUE = {"ids": [[3, 4], [5]], "reward": [0.1 + 0.2, -1], "logps": [[-0.5, 0.0], [-1.5]]}
DEEP = "[" * 100_000


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STAGEWISE_SCRATCH", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def keep(columns: dict[str, str] = COLUMNS, runtime: Runtime | None = None) -> tuple[Any, bool]:
    """The value of a chunk of two rows, and whether it was computed."""
    computed = []
    runtime = runtime or read_runtime("evaluate")
    with PartialResults("evaluate", {}, [], {}, runtime, Processes(0, 1, CPU)) as this_run:
        value = this_run.keep("pairs-0-2", 2, columns, lambda: computed.append(1) or VALUE)
    return value, bool(computed)


def kept_file(scratch: Path) -> Path:
    (path,) = scratch.glob("evaluate-*/kept/pairs-0-2.json")
    return path


def test_a_chunk_comes_back_to_the_last_bit() -> None:
    assert keep() == (VALUE, True)
    value, computed = keep()
    assert (value, computed) == (VALUE, False)
    assert value["reward"][0] == 0.1 + 0.2


def test_the_chunks_of_all_rows_are_joined_in_order() -> None:
    runtime = read_runtime("evaluate").model_copy(update={"rows_per_partial_result": 2})
    computed: list[range] = []

    def compute(chunk: range) -> dict[str, list]:
        computed.append(chunk)
        if chunk.start == 4:
            raise KeyboardInterrupt
        return {"reward": [row / 10 for row in chunk]}

    def keep_all(count: int) -> dict[str, list]:
        with PartialResults("evaluate", {}, [], {}, runtime, Processes(0, 1, CPU)) as this_run:
            return this_run.keep_all("pairs", count, {"reward": NUMBER}, compute)

    with pytest.raises(KeyboardInterrupt):
        keep_all(5)
    assert computed == [range(2), range(2, 4), range(4, 5)]
    assert keep_all(4) == {"reward": [0.0, 0.1, 0.2, 0.3]}
    assert len(computed) == 3  # the first two were kept


def again_with_a_warning(scratch: Path, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    assert keep() == (VALUE, True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert "pairs-0-2.json is damaged" in line
    assert keep() == (VALUE, False)
    assert kept_file(scratch).is_file()


CONTENTS = ["", "[]", "{}", "null", "3", DEEP, "9" * 5000, '{"code": 1}', '{"value": {}}', "\u00ff"]
CONTENTS += [f'{{"code": "a", "sha256": "b", "value": {DEEP}{"]" * len(DEEP)}}}']


@pytest.mark.parametrize("content", CONTENTS)
def test_what_is_no_record_is_computed_again(scratch: Path, capsys: pytest.CaptureFixture, content: str) -> None:
    keep()
    kept_file(scratch).write_text(content)
    again_with_a_warning(scratch, capsys)


VALUES: list[Any] = [None, [], {}, "a", {"ids": [[3], [4]]}, VALUE | {"more": [1, 2]}, VALUE | {"reward": 3}]
VALUES += [VALUE | {"reward": [1.0]}, VALUE | {"reward": ["a", "b"]}, VALUE | {"reward": [True, 1.0]}]
VALUES += [VALUE | {"reward": [None, 1.0]}, VALUE | {"ids": [3, 4]}, VALUE | {"ids": [[3], []]}]
VALUES += [VALUE | {"logps": [[-0.5], []]}, VALUE | {"logps": [[-0.5], [None]]}, VALUE | {"logps": [-0.5, -1.5]}]
VALUES += [VALUE | {"ids": [[3], [-1]]}, VALUE | {"ids": [[3], [0.5]]}, VALUE | {"ids": "ab"}]


@pytest.mark.parametrize("value", VALUES)
def test_a_value_of_another_form_is_computed_again_whatever_its_checksum(
    scratch: Path, capsys: pytest.CaptureFixture, value: Any
) -> None:
    keep()
    record = json.loads(kept_file(scratch).read_text())
    kept_file(scratch).write_text(json.dumps(record | {"value": value, "sha256": value_hash(value)}))
    again_with_a_warning(scratch, capsys)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_gives_way(scratch: Path, capsys: pytest.CaptureFixture, kind: str) -> None:
    keep()
    path = kept_file(scratch)
    path.unlink()
    (Path.mkdir if kind == "folder" else os.mkfifo)(path)
    again_with_a_warning(scratch, capsys)


def test_a_link_is_not_written_through(scratch: Path) -> None:
    keep()
    path = kept_file(scratch)
    path.unlink()
    path.symlink_to(scratch / "outside")
    assert keep() == (VALUE, True)
    assert not (scratch / "outside").exists()
