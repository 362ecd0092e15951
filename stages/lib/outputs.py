"""Outs that appear whole or not at all: written under a hidden temporary name beside the target, then renamed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    """Put `partial` (file or folder) in the place of `out`, whatever stood there."""
    if out.is_dir() and not out.is_symlink():
        shutil.rmtree(out)
    partial.replace(out)


def remove(path: Path) -> None:
    """Remove a file, link or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink()
