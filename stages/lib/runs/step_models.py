"""Whole model folders of steps on the way: `step_200`, `step_400`, … in one folder, which is the model's in the end.

They need no entry in a checkpoint. A run that goes on from an earlier step writes again what came after it, and what it
would not write again was removed by none: a folder goes only when `keep_last` later ones are there, and then it is not
among the last at the end either.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from stages.lib.command.outputs import remove
from stages.lib.runs.checkpoints import sync

PREFIX = "step_"


def names_of_models(folder: Path) -> list[str]:
    """The whole folders, in the order of the steps."""
    found = [path.name for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


def step_of(name: str) -> int:
    return int(name.removeprefix(PREFIX))


def add_model(folder: Path, step: int, keep_last: int | None, write: Callable[[Path], None]) -> None:
    """Write the model of a step (1-based) whole or not at all, then remove those before the last `keep_last`.

    Args:
        write: fills an empty folder.
    Raises:
        OSError: the disk is full or not writable; the folders before are as they were.
    """
    final, partial = folder / f"{PREFIX}{step}", folder / f"{PREFIX}{step}.partial"
    try:
        remove(partial)
        partial.mkdir(parents=True)
        write(partial)
        for path in (*partial.rglob("*"), partial):
            sync(path)
        remove(final)
        partial.rename(final)
        sync(folder)
    except OSError:
        remove(partial)
        raise
    for name in names_of_models(folder)[: -keep_last if keep_last else 0]:
        remove(folder / name)


def take_models(source: Path, target: Path, step: int) -> None:
    """Make the folders in `target` those of `source`, up to a step."""
    if source != target:
        remove(target)
        if source.is_dir():
            shutil.copytree(source, target, copy_function=link_or_copy)
    for name in names_of_models(target):
        if step_of(name) > step:
            remove(target / name)


def copy_models(source: Path, target: Path) -> None:
    """Put the folders into that of the model which the run has ended with."""
    for name in names_of_models(source):
        shutil.copytree(source / name, target / name, copy_function=link_or_copy)


def link_or_copy(source: str, target: str) -> None:
    """Two names for a file that nothing changes any more, or a copy where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
