"""Model folders of steps on the way: which stay, and what a crash in the middle leaves."""

from collections.abc import Callable
from pathlib import Path

import pytest

from stages.lib.runs.step_models import add_model, copy_models, names_of_models, take_models


def writes(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "adapter/weights").write_text(f"adapter {text}")
        (folder / "weights").write_text(text)

    return write


@pytest.mark.parametrize(
    ("keep_last", "left"), [(None, [5, 10, 15, 20]), (1, [20]), (3, [10, 15, 20]), (9, [5, 10, 15, 20])]
)
def test_the_newest_stay(keep_last: int | None, left: list[int], tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        add_model(tmp_path / "models", step, keep_last, writes(str(step)))
    assert names_of_models(tmp_path / "models") == [f"step_{step}" for step in left]
    copy_models(tmp_path / "models", tmp_path / "published")
    assert {path.name: (path / "weights").read_text() for path in (tmp_path / "published").iterdir()} == {
        f"step_{step}": str(step) for step in left
    }
    assert (tmp_path / "published/step_20/adapter/weights").read_text() == "adapter 20"


def test_half_a_folder_is_none(tmp_path: Path) -> None:
    add_model(tmp_path, 5, 1, writes("5"))

    def fails(folder: Path) -> None:
        writes("half")(folder)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        add_model(tmp_path, 10, 1, fails)
    (tmp_path / "step_15.partial").mkdir()  # of a kill
    assert names_of_models(tmp_path) == ["step_5"]
    add_model(tmp_path, 15, 1, writes("15"))
    assert [path.name for path in tmp_path.iterdir()] == ["step_15"]


@pytest.mark.parametrize("keep_last", [None, 1, 2])
@pytest.mark.parametrize("resumed", [0, 7, 14])
@pytest.mark.parametrize("killed", [7, 16])
def test_a_run_that_goes_on_from_an_earlier_step_ends_with_the_same(
    killed: int, resumed: int, keep_last: int | None, tmp_path: Path
) -> None:
    def run(folder: Path, steps: range) -> None:
        for step in steps:
            if step % 3 == 0:
                add_model(folder, step, keep_last, writes(str(step)))

    run(tmp_path / "whole", range(1, 25))
    run(tmp_path / "cut", range(1, killed + 1))
    source = tmp_path / "cut"
    for target in (source, tmp_path / "of other code"):
        take_models(source, target, min(resumed, killed))
        run(target, range(min(resumed, killed) + 1, 25))
        assert names_of_models(target) == names_of_models(tmp_path / "whole")
