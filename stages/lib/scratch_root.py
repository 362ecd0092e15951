"""Where a project keeps what is no result: training state, the log of runs, what trackers write."""

import os
from pathlib import Path


def scratch_root() -> Path:
    """`$STAGEWISE_SCRATCH`, or `.scratch` in the project."""
    return in_project(Path(os.environ.get("STAGEWISE_SCRATCH") or ".scratch"))


def in_project(path: Path) -> Path:
    """A path relative to the project, where it stays.

    `dvc exp run --temp` and `--queue` run in a temporary copy of the project, which is removed; DVC then names the
    project itself in `$DVC_ROOT`.
    """
    project = Path(os.environ.get("DVC_ROOT") or ".")
    return path if project.resolve() == Path.cwd() else project / path
