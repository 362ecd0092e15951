"""Outs that appear whole or not at all: written under a hidden temporary name beside the target, then renamed."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.lib.command.errors import StageError


@contextmanager
def written_whole(*outs: Path) -> Iterator[tuple[Path, ...]]:
    """Yield one temporary path for each out; on success rename each to its out, on failure remove them all."""
    partials = tuple(partial_name(out) for out in outs)
    for partial in partials:
        partial.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
    try:
        yield partials
        for partial, out in zip(partials, outs, strict=True):
            replace(partial, out)
    finally:
        for partial in partials:
            remove(partial)


def partial_name(out: Path) -> Path:
    """The temporary name of an out, in the same folder so that a rename is atomic; `.gitignore` covers it."""
    return out.with_name(f".{out.name}.partial")


def replace(partial: Path, out: Path) -> None:
    """Put `partial` (file or folder) in the place of `out`, whatever stood there; a link goes, not what it leads to."""
    if partial.is_dir() or out.is_dir():  # a rename puts a file over a file or a link to one, and nothing else
        remove(out)
    partial.replace(out)


def remove(path: Path) -> None:
    """Remove a file, link or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink()


def require_places(outs: Iterable[Path]) -> None:
    """Raise StageError unless a file or folder can be made in the folder of each out; the folders are made."""
    for out in outs:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StageError(
                f"{out} cannot be written: {error.filename}: {error.strerror}; expected a folder there"
            ) from None
        if not os.access(out.parent, os.W_OK | os.X_OK):
            raise StageError(f"{out} cannot be written: its folder is closed or read-only; change its permissions")
