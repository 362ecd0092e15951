"""Outs that appear whole or not at all."""

from pathlib import Path

import pytest

from stages.lib.command.outputs import written_whole


def test_outs_take_the_place_of_what_was_there(tmp_path: Path) -> None:
    folder, file = tmp_path / "models/rm", tmp_path / "m.json"
    folder.mkdir(parents=True)
    (folder / "old").write_text("old")
    with written_whole(folder, file) as (partial_folder, partial_file):
        partial_folder.mkdir()
        (partial_folder / "new").write_text("new")
        partial_file.write_text("{}")
        assert [path.name for path in folder.iterdir()] == ["old"]
        assert not file.exists()
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert file.read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.json", "models"]
    assert [path.name for path in folder.parent.iterdir()] == ["rm"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    file.write_text("old")

    def interrupted() -> None:
        with written_whole(file) as (partial,):
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]


def test_a_half_written_out_of_a_killed_run_is_swept_away(tmp_path: Path) -> None:
    out = tmp_path / "models/rm"
    with written_whole(out) as (partial,):
        partial.mkdir()
        (partial / "left").write_text("by a kill")
        with written_whole(out) as (again,):
            assert not again.exists()
            again.mkdir()
        partial.mkdir()
    assert list(out.iterdir()) == []
